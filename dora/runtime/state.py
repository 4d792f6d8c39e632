"""The model's tensors on this rank, and the whole model's state put together from all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dora.partition import Chain
from dora.runtime import checkpoint
from dora.runtime.optimizers import Entry
from dora.runtime.parcel import Parcel, pack
from dora.runtime.placement import drop_remote, holders, put
from dora.runtime.priority import WEIGHTS
from dora.runtime.transport import Transport
from dora.spec import Plan

_FETCH_TAG = 1


class ModelState:
    """Tensors that this rank holds, by the plain module's names; drops all others.

    Attributes:
        parameters: Of this rank's blocks; a tied one under its first name.
        buffers: Of this rank's blocks.
        holders: Ranks of every parameter and buffer of the module, in the module's order.
    """

    def __init__(
        self, chain: Chain, plan: Plan, rank: int, transport: Transport, timeout_s: float
    ) -> None:
        self._chain = chain
        self._rank = rank
        self._transport = transport
        self._timeout_s = timeout_s
        self._keys = chain.state_keys
        self._names = {**chain.parameters.keys, **chain.buffers.keys}
        whole = {**_named(chain.module.named_parameters), **_named(chain.module.named_buffers)}
        self._like = {name: torch.empty_like(t, device="meta") for name, t in whole.items()}
        self._hold(plan, range(len(plan.devices)))

    def move(
        self,
        plan: Plan,
        members: Sequence[int],
        arrived: Mapping[str, Parcel],
        beside: Sequence[Plan] = (),
    ) -> None:
        """Holds what a new plan wants of this rank, and nothing else.

        Args:
            plan: The new placement.
            members: Ranks that take part from now on.
            arrived: Every tensor that was missing here, or that is set back.
            beside: Plans that are held with it.
        """
        for name, parcel in arrived.items():
            tensor = self.here(name)
            if tensor is None:
                device = self._device(name)
                tensor = put(self._chain, name, parcel.value.detach().to(device))
            else:
                with torch.no_grad():
                    tensor.copy_(parcel.value)
            grad = parcel.grad
            tensor.grad = None if grad is None else grad.to(tensor.device, copy=True)
        self._hold(plan, members, beside)

    def parcels(self, names: Iterable[str], entries: Mapping[str, Entry]) -> dict[str, Parcel]:
        """Returns tensors of this rank with what the optimizers have of them; copies nothing."""
        here = {name: self.here(name) for name in names}
        return {n: pack(t, entries.get(n)) for n, t in here.items() if t is not None}

    def holders_in(self, *plans: Plan) -> dict[str, tuple[int, ...]]:
        """Returns the ranks that hold each tensor under plans that are held together."""
        chain = self._chain
        return {
            **holders(chain.parameters.blocks, *plans),
            **holders(chain.buffers.blocks, *plans),
        }

    def _hold(self, plan: Plan, members: Sequence[int], beside: Sequence[Plan] = ()) -> None:
        chain, self._plan, self._members = self._chain, plan, tuple(members)
        self.holders = self.holders_in(plan, *beside)
        here = {name for name, ranks in self.holders.items() if self._rank in ranks}
        drop_remote(chain, here)
        parameters = _named(chain.module.named_parameters)
        buffers = _named(chain.module.named_buffers)
        self.parameters = {n: parameters[n] for n in chain.parameters.names if n in here}
        self.buffers = {n: buffers[n] for n in chain.buffers.names if n in here}
        self._trainable = {n: p.requires_grad for n, p in self.parameters.items()}

    def _device(self, name: str) -> torch.device:
        """Returns where a tensor that is not here belongs."""
        names = {**self._chain.parameters.names, **self._chain.buffers.names}[name]
        path, _, attribute = names[0].rpartition(".")
        stand_in: torch.Tensor = getattr(self._chain.module.get_submodule(path), attribute)
        return stand_in.device

    def equalise(self) -> None:
        """Gives all holders of a tensor the value that the first of them has."""
        for name, ranks in self.holders.items():
            tensor = self.here(name)
            if tensor is not None and len(ranks) > 1:
                value = tensor.detach().cpu().contiguous()
                self._transport.broadcast(value, ranks[0], ranks, f"initial {name}")
                with torch.no_grad():
                    tensor.copy_(value)

    def check_trainable(self) -> None:
        """Raises ValueError if a parameter was frozen or unfrozen since; peers would not know."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad != self._trainable[name]:
                raise ValueError(
                    f"{self._names[name][0]}: requires_grad given {parameter.requires_grad}, "
                    f"allowed {self._trainable[name]} as when DoraParallel was made: freeze and "
                    "unfreeze before that"
                )

    def here(self, name: str) -> torch.Tensor | None:
        """Returns a tensor by first name, None if another rank has it."""
        parameter = self.parameters.get(name)
        return self.buffers.get(name) if parameter is None else parameter

    def gather(self) -> dict[str, torch.Tensor]:
        """Returns the whole state on every rank under the plain module's keys; collective."""
        values = {}
        for name in self._stored():
            values[name] = self._value(name)
            self._transport.broadcast(
                values[name], self.holders[name][0], self._members, f"state_dict {name}"
            )
        first = self._first_names()
        return {key: values[first[key]] for key in self._keys}

    def load(self, state: Mapping[str, torch.Tensor], *, strict: bool) -> tuple[list[str], ...]:
        """Copies this rank's tensors from a whole state; returns missing and unexpected keys."""
        missing = [key for key in self._keys if key not in state]
        unexpected = [key for key in state if key not in self._keys]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"load_state_dict: missing {missing or 'nothing'}, unexpected "
                f"{unexpected or 'nothing'}, allowed: exactly the plain module's names"
            )
        for key, first in self._first_names().items():
            if key in state and state[key].shape != self._like[first].shape:
                raise RuntimeError(
                    f"load_state_dict: {key}: given shape {tuple(state[key].shape)}, allowed "
                    f"{tuple(self._like[first].shape)}"
                )
        with torch.no_grad():
            for key, first in self._first_names().items():
                target = self.here(first)
                if target is not None and key in state:
                    target.copy_(state[key])
        return missing, unexpected

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes one safetensors file per stage on the first rank; collective."""
        shards: list[list[str]] = [[] for _ in self._plan.stages]
        users = self.holders_in(self._plan)
        for name in self._stored():
            placed = self._plan.placement(users[name][0])
            assert placed is not None
            shards[placed[0]].append(name)
        checkpoint.write(directory, shards, self._to_first)

    def read(self, path: str | os.PathLike[str]) -> None:
        """Reads this rank's tensors, and nothing else, from safetensors files."""
        wanted = {}
        for name in self._stored():
            target = self.here(name)
            if target is not None:
                wanted[name] = self._names[name], target
        checkpoint.read(path, wanted)

    def _first_names(self) -> dict[str, str]:
        """Returns state-dict key -> the name its tensor is stored under."""
        keys = set(self._keys)
        return {key: first for first, names in self._names.items() for key in names if key in keys}

    def _stored(self) -> list[str]:
        """Returns the first name of every tensor of the state dict, in its order."""
        first = self._first_names()
        return list(dict.fromkeys(first[key] for key in self._keys))

    def _value(self, name: str) -> torch.Tensor:
        """Returns a CPU copy of a tensor, or room for it."""
        tensor = self.here(name)
        if tensor is None:
            return torch.empty_like(self._like[name], device="cpu").contiguous()
        return tensor.detach().cpu().clone().contiguous()

    def _to_first(self, name: str) -> torch.Tensor | None:
        first, owner, value = self._members[0], self.holders[name][0], self._value(name)
        if owner != first and self._rank == owner:
            pending = self._transport.send(
                value, first, _FETCH_TAG, f"save {name}", priority=WEIGHTS
            )
            pending.wait(self._timeout_s)
        if owner != first and self._rank == first:
            pending = self._transport.receive(value, owner, _FETCH_TAG, f"save {name}")
            pending.wait(self._timeout_s)
        return value if self._rank == first else None


def _named(named: Callable[..., Any]) -> dict[str, Any]:
    return dict(named(remove_duplicate=False))


def local_modules(chain: Chain, positions: Sequence[int]) -> list[nn.Module]:
    """Returns all modules inside the unit calls at those positions."""
    units = [chain.module.get_submodule(chain.calls[position]) for position in positions]
    return [module for unit in units for module in unit.modules()]
