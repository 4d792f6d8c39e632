"""A tensor of the model with all that goes with it when it moves: gradient, optimizer state.

The receiver needs to know what comes before it comes: a layout says it in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dora.runtime.optimizers import Entry

# Of one message: short enough that a step is not held up for long when one has come of age (see
# csrc/send_queue.h), 70 ms at 30 Mbit/s, and that what is interrupted loses little; long enough
# that the cost of a message, about 0.1 ms in Python, is small beside 2 ms on a gigabit link.
CHUNK_BYTES = 2**18

_VALUE, _GRAD, _STATE = "value", "grad", "state."

Layout = dict[str, Any]


class Parcel(NamedTuple):
    """Tensors on the CPU or a GPU.

    Attributes:
        tensors: The value, the gradient if there is one, and the optimizer's, by slot.
        note: The rest of the optimizer's entry, None if no optimizer is known.
    """

    tensors: dict[str, torch.Tensor]
    note: dict[str, Any] | None

    @property
    def value(self) -> torch.Tensor:
        """The parameter or buffer itself."""
        return self.tensors[_VALUE]

    @property
    def grad(self) -> torch.Tensor | None:
        """What backward has added up so far."""
        return self.tensors.get(_GRAD)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def entry(self) -> Entry | None:
        """Returns what an optimizer had of the parameter."""
        if self.note is None:
            return None
        state = {k.removeprefix(_STATE): t for k, t in self.tensors.items() if k.startswith(_STATE)}
        first, second = self.note["place"]
        return Entry((first, second), self.note["options"], self.note["scalars"], state)

    def copy(self) -> Parcel:
        """Returns a copy on the CPU that later steps do not change."""
        return Parcel(
            {slot: _host_copy(tensor) for slot, tensor in self.tensors.items()}, self.note
        )

    def chunks(self) -> list[torch.Tensor]:
        """Returns all tensors as messages: views of those on the CPU, copies of others."""
        return [chunk for slot in sorted(self.tensors) for chunk in _chunks(self.tensors[slot])]

    def layout(self) -> Layout:
        """Returns what `room` needs."""
        shapes = {
            s: [str(t.dtype).removeprefix("torch."), [*t.shape]] for s, t in self.tensors.items()
        }
        return {"tensors": shapes, "note": self.note}


def pack(tensor: torch.Tensor, entry: Entry | None) -> Parcel:
    """Returns a tensor of the model with what an optimizer has of it; nothing is copied."""
    tensors = {_VALUE: tensor.detach()}
    if tensor.grad is not None:
        tensors[_GRAD] = tensor.grad.detach()
    if entry is None:
        return Parcel(tensors, None)
    tensors.update({f"{_STATE}{key}": value.detach() for key, value in entry.tensors.items()})
    note = {"place": entry.place, "options": entry.options, "scalars": entry.scalars}
    return Parcel(tensors, note)


def room(layout: Layout) -> Parcel:
    """Returns a parcel to receive into."""
    shapes: Mapping[str, Any] = layout["tensors"]
    tensors = {
        slot: torch.empty(shape, dtype=getattr(torch, dtype))
        for slot, (dtype, shape) in shapes.items()
    }
    return Parcel(tensors, layout["note"])


def _chunks(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.cpu().contiguous().reshape(-1)
    return list(flat.view(torch.uint8).split(CHUNK_BYTES)) if flat.numel() else []


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
