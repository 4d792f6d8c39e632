"""Reads the CSV files beside this module, and explains names that are not in them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from dora.errors import SpecError

Row = Mapping[str, str]


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of the catalogue file `name`, such as 'devices.csv'."""
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def by_name(name: str) -> Mapping[str, Row]:
    """Returns the rows of a catalogue file under the value of their column `name`."""
    return MappingProxyType({row["name"]: row for row in rows(name)})


def find(what: str, name: str, table: Mapping[str, Row]) -> Row:
    """Returns one row; SpecError lists the names that are closest to `name`."""
    if name not in table:
        raise SpecError(f"{what}: given {name!r}, {closest(name, table)}")
    return table[name]


def closest(name: str, allowed: Iterable[str]) -> str:
    """Returns 'allowed: ...' with the most similar names, or all names if none is similar."""
    names = list(allowed)
    near = get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    # A family name ('jetson') is far from any full name by edit distance.
    near += [known for known in names if name and name.lower() in known and known not in near]
    return f"allowed: like {', '.join(near[:5])}" if near else f"allowed: {', '.join(names)}"
