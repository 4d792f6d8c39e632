"""Saves and loads a spread-out model as safetensors files that the plain module can read too.

A model of several stages becomes one file per stage and an index, as Hugging Face lays them
out; rank 0 holds one stage in memory at a time. Tied weights are stored once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dora.errors import SpecError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(
    directory: str | os.PathLike[str],
    shards: Sequence[Sequence[str]],
    fetch: Callable[[str], torch.Tensor | None],
) -> None:
    """Writes one file per shard; every rank calls it, rank 0 writes.

    Args:
        directory: Created if missing; older files stay whole until their successor is complete.
        shards: Tensor names per file.
        fetch: Brings a tensor to rank 0, a collective call; returns None on other ranks.
    """
    directory = Path(directory)
    filled = [names for names in shards if names]
    where: dict[str, str] = {}
    for i, names in enumerate(filled):
        name = SINGLE if len(filled) == 1 else f"model-{i + 1:05}-of-{len(filled):05}.safetensors"
        tensors = {key: fetch(key) for key in names}
        if all(tensor is not None for tensor in tensors.values()):
            directory.mkdir(parents=True, exist_ok=True)
            part = directory / f"{name}.part"
            save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, part)
            part.replace(directory / name)
            where.update(dict.fromkeys(names, name))
    if len(filled) > 1 and where:
        part = directory / f"{INDEX}.part"
        part.write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))
        part.replace(directory / INDEX)


def read(
    path: str | os.PathLike[str], wanted: Mapping[str, tuple[Sequence[str], torch.Tensor]]
) -> None:
    """Copies tensors from a file, or a directory with an index, and reads nothing else.

    Args:
        path: A .safetensors file, or a directory that `write` or Hugging Face made.
        wanted: Name -> (all names it may be stored under, the tensor to fill).

    Raises:
        SpecError: The path is no checkpoint, a name is missing, or a shape differs.
    """
    files = _files_by_name(Path(path))
    opened: dict[Path, Any] = {}
    for name, (aliases, target) in wanted.items():
        stored = next((alias for alias in aliases if alias in files), None)
        if stored is None:
            raise SpecError(f"{path}: {name} is missing, allowed: a checkpoint of this model")
        file = files[stored]
        if file not in opened:
            opened[file] = _open(file)
        tensor = opened[file].get_tensor(stored)
        if tensor.shape != target.shape:
            raise SpecError(
                f"{file}: {stored}: given shape {tuple(tensor.shape)}, "
                f"allowed {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SpecError(f"{file}: can not be read as safetensors: {error}") from None


def _files_by_name(path: Path) -> dict[str, Path]:
    index = path / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: path / file for name, file in weight_map.items()}
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise SpecError(f"{path}: given no checkpoint, allowed: a file or folder that save() made")
    return dict.fromkeys(_open(file).keys(), file)
