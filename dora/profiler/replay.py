"""Profiles from files: devices are measured apart, and the planner gets one profile of them all.

::

    profile = load_profiles(["laptop.json", "jetson.json"])
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from dora.errors import SpecError
from dora.files import load
from dora.spec import BlockCost, BlockProfile, ModelProfile

# These depend on the kernels of a device, so devices may differ; the planner gets the largest.
_LARGEST = ("flops", "traffic_bytes", "num_ops", "activation_bytes")


def load_profiles(paths: Sequence[str | os.PathLike[str]]) -> ModelProfile:
    """Reads profiles of one model, measured on one or more devices, and merges them.

    Raises:
        SpecError: A file is not valid, or the profiles do not fit together.
    """
    return merge_profiles([load(ModelProfile, path) for path in paths])


def merge_profiles(profiles: Sequence[ModelProfile]) -> ModelProfile:
    """Returns one profile with the timings of all devices.

    Names, sizes, parameters and boundary bytes must agree. FLOPs, operations, traffic and
    activation bytes depend on a device's kernels; the largest counts.

    Raises:
        SpecError: None given, two of different models, or a device measured twice; the message
            names the first field that differs and both values.
    """
    if not profiles:
        raise SpecError("profiles: given none, allowed: at least one")
    first = profiles[0]
    for i, other in enumerate(profiles[1:], start=1):
        for field, a, b in _differences(_structure(first), _structure(other)):
            raise SpecError(
                f"profiles[{i}].{field}: given {b!r}, allowed {a!r} as in profiles[0]: "
                "profiles to merge must be of the same model and micro-batch sizes"
            )
    blocks = [_merge_blocks(same) for same in zip(*(p.blocks for p in profiles), strict=True)]
    rates = tuple(rate for profile in profiles for rate in profile.codec_rates)
    overheads = tuple(overhead for profile in profiles for overhead in profile.overheads)
    found = {"blocks": tuple(blocks), "codec_rates": rates, "overheads": overheads}
    return first.model_copy(update=found)


def _merge_blocks(blocks: tuple[BlockProfile, ...]) -> BlockProfile:
    rows = zip(*(block.costs for block in blocks), strict=True)
    costs = tuple(_merge_costs(blocks[0].name, row) for row in rows)
    return blocks[0].model_copy(update={"costs": costs})


def _merge_costs(block: str, costs: tuple[BlockCost, ...]) -> BlockCost:
    timings = tuple(timing for cost in costs for timing in cost.timings)
    devices = [timing.device for timing in timings]
    for device in devices:
        if devices.count(device) > 1:
            raise SpecError(
                f"device {device!r}: given {devices.count(device)} timings of block {block!r}, "
                "allowed: one profile per device"
            )
    largest = {field: max(getattr(cost, field) for cost in costs) for field in _LARGEST}
    return costs[0].model_copy(update={**largest, "timings": timings})


def _structure(profile: ModelProfile) -> dict[str, Any]:
    """Returns the fields in which profiles of one model agree on every device."""
    body = profile.model_dump(mode="json", exclude={"codec_rates", "overheads"})
    for block in body["blocks"]:
        for cost in block["costs"]:
            for field in (*_LARGEST, "timings"):
                del cost[field]
    return body


def _differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields field path and both values wherever two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a:
            yield from _differences(a[key], b[key], f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{path} (how many)", len(a), len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _differences(x, y, f"{path}[{i}]")
    elif a != b:
        yield path, a, b
