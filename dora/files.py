"""Reads and writes the vocabulary as files; what is wrong in a file is said in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from dora.errors import SpecError
from dora.spec import Spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SpecT = TypeVar("SpecT", bound=Spec)


def load(cls: type[SpecT], path: str | os.PathLike[str]) -> SpecT:
    """Reads a value of type `cls` from a `.toml` or `.json` file.

    Raises:
        SpecError: Not readable or not valid; one line with file, field, given and allowed.
    """
    if Path(path).suffix == ".toml":
        return validate(cls, read_toml(path), source=str(path))
    text = _read(path)
    try:
        return cls.from_json(text)
    except ValidationError as error:
        raise SpecError(f"{path}: {one_line(error)}") from None
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from None


def save(spec: Spec, path: str | os.PathLike[str]) -> None:
    """Writes `spec` as `.toml` or `.json`; a crash half-way leaves the old file whole."""
    path = Path(path)
    toml = path.suffix == ".toml"
    text = tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True)) if toml else None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text if text is not None else spec.to_json() + "\n", encoding="utf-8")
    partial.replace(path)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the tables of a TOML file; SpecError names file, line and problem."""
    try:
        tables: dict[str, Any] = tomllib.loads(_read(path))
        return tables
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not valid TOML: {error}") from None


def validate(cls: type[SpecT], data: Mapping[str, Any], *, source: str) -> SpecT:
    """Checks plain data against `cls`; SpecError names `source`, field, given and allowed."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise SpecError(f"{source}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """Returns 'field: given X, allowed Y' for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "content"
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{field}: given nothing, allowed: this field is required"
    if first["type"] == "extra_forbidden":
        return f"{field}: given an unknown field, allowed: only the documented ones"
    given = json.dumps(first["input"], default=str)
    given = given if len(given) <= 60 else given[:57] + "..."
    return f"{field}: given {given}, allowed: {first['msg'].removeprefix('Input should be ')}"


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: can not be read: not UTF-8 text") from None
