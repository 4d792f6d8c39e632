"""Writes what a rank has of the model when the job can not go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from dora.runtime.parcel import Parcel
from dora.runtime.snapshot import Snapshot


def write_rescue(
    directory: Path, rank: int, here: Mapping[str, Parcel], snapshots: Sequence[Snapshot]
) -> Path:
    """Writes `rank-N.safetensors`: values by name, the rest as `grad/NAME` and `state.KEY/NAME`.

    Args:
        directory: Made if it is missing.
        rank: This process.
        here: Of this rank's tensors.
        snapshots: Others are taken from these, from the newest first; the file's metadata says
            which version they are of.

    Returns:
        The file.
    """
    parcels, versions = dict(here), {}
    for snapshot in snapshots:
        for name in snapshot.others.keys() - parcels.keys():
            parcels[name] = snapshot.others[name]
            versions[name] = f"steps={snapshot.version.steps} calls={snapshot.version.calls}"
    tensors: dict[str, torch.Tensor] = {}
    for name, parcel in parcels.items():
        for slot, tensor in parcel.tensors.items():
            key = name if tensor is parcel.value else f"{slot}/{name}"
            tensors[key] = tensor.cpu().contiguous().clone()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank-{rank}.safetensors"
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=versions or None)
    part.replace(path)
    return path
