"""Dropout masks that do not depend on where a block runs.

Policy: before each unit, and before the glue code after it, the generators are seeded from
(seed, step, micro-batch, position). A plain module under `seeded_units` therefore draws the
same masks, micro-batch by micro-batch, as the same module spread over devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import nn

from dora.partition import Chain


class SeedKey(NamedTuple):
    """What the masks of one forward pass depend on."""

    seed: int
    step: int
    microbatch: int


def _stir(state: int, part: int) -> int:
    """Mixes an integer into 64 bits; splitmix64 (Steele et al., Fast splittable PRNGs, 2014)."""
    state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return state ^ (state >> 31)


@lru_cache(maxsize=64)
def _start(key: SeedKey) -> int:
    """Returns the state of a forward pass; its many seeds differ only from here on."""
    return reduce(_stir, key, 0)


def _seed(key: SeedKey | None, point: int) -> None:
    if key is None:
        return
    mixed = _stir(_start(key), point) >> 1  # 63 bits
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(mixed)


def seed_unit(key: SeedKey | None, position: int) -> None:
    """Seeds for the unit at `position` of the chain."""
    _seed(key, 2 * position + 1)


def seed_glue(key: SeedKey | None, position: int) -> None:
    """Seeds for the code between the unit at `position` (-1: the start) and the next one."""
    _seed(key, 2 * position + 2)


@contextmanager
def seeded_units(chain: Chain, key: SeedKey) -> Iterator[None]:
    """Runs the plain module of `chain` with the masks that the distributed one draws."""

    def handler(position: int, unit: nn.Module, call: Any) -> Any:
        seed_unit(key, position)
        output = call()
        seed_glue(key, position)
        return output

    with torch.random.fork_rng(devices=[]), chain.intercept(handler):
        seed_glue(key, -1)
        yield
