"""What every type of the vocabulary shares: frozen models, value ranges, versioned JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
# From best to worst: a meter, a power model of what was seen, one of what should happen.
Provenance = Literal["measured", "modelled from measured activity", "modelled", "none"]

SpecT = TypeVar("SpecT", bound="Spec")


class Spec(BaseModel):
    """Base of the vocabulary: frozen, no unknown fields, no NaN, versioned JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """Returns indented JSON with the schema name and version first."""
        body = self.model_dump(mode="json", exclude_none=True)
        return json.dumps({"schema": f"{type(self).__name__}/{SCHEMA_VERSION}", **body}, indent=2)

    @classmethod
    def from_json(cls: type[SpecT], text: str) -> SpecT:
        """Inverse of `to_json`; raises ValueError on another schema or version."""
        body = json.loads(text)
        given = body.pop("schema", None) if isinstance(body, dict) else None
        if given != f"{cls.__name__}/{SCHEMA_VERSION}":
            raise ValueError(f"schema: given {given!r}, allowed '{cls.__name__}/{SCHEMA_VERSION}'")
        return cls.model_validate(body)


def check(holds: bool, message: str) -> None:
    """Raises ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


def check_unique(what: str, names: Sequence[str]) -> None:
    """Raises ValueError that lists the names given twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"{what} names must be unique, given twice: {', '.join(twice)}")
