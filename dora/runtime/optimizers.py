"""Finds the user's optimizers as they step, and gives them other parameters when a stage moves.

Nobody tells the runtime about optimizers. torch calls a hook before and after every step of any
optimizer; those that step a parameter of this rank are the user's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from dora.errors import DoraError

NOWHERE = (-1, -1)

_SCALARS = (bool, int, float, str, type(None))


class Entry(NamedTuple):
    """What an optimizer has of one parameter.

    Attributes:
        place: Number of the optimizer in the order of first steps, number of its group; `NOWHERE`
            if none steps it.
        options: Of that group, as far as they are plain values.
        scalars: Of the parameter's state.
        tensors: Of the parameter's state.
    """

    place: tuple[int, int]
    options: dict[str, Any]
    scalars: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Optimizers:
    """The optimizers that step this rank's parameters.

    Attributes:
        steps: Calls of `step` of all of them.
        updates: The same, with the optimizers that take turns counted as one.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.updates = 0
        self._stepped: set[int] = set()  # since the last update began
        self._known: list[weakref.ref[Optimizer]] = []
        self._ours: Any = WeakIdKeyDictionary()  # every parameter that this rank ever had
        self._here: dict[str, nn.Parameter] = {}
        self._unused: nn.Parameter | None = None
        self._waiting: dict[str, Entry | None] = {}  # for an optimizer that has not stepped yet
        this = weakref.ref(self)
        hooks = [
            register_optimizer_step_pre_hook(_calling(this, Optimizers._before)),
            register_optimizer_step_post_hook(_calling(this, Optimizers._after)),
        ]
        self.close = weakref.finalize(self, _remove, hooks)

    def hold(
        self,
        parameters: Mapping[str, nn.Parameter],
        arrived: Mapping[str, Entry | None],
        unused: nn.Parameter | None,
    ) -> None:
        """Makes the optimizers step these parameters, and no others of the model.

        Args:
            parameters: Of this rank, by name.
            arrived: What came with those that are new here or were set back.
            unused: What stands in where this rank has none.
        """
        gone = {name for name in self._here if name not in parameters}
        self._here, self._unused = dict(parameters), unused
        for parameter in [*parameters.values(), *([] if unused is None else [unused])]:
            self._ours[parameter] = True
        self._waiting = {
            name: entry
            for name, entry in {**self._waiting, **arrived}.items()
            if name not in gone and (entry is None or entry.place != NOWHERE)
        }
        for number, optimizer in self._living():
            self._rewire(number, optimizer)

    def entries(self) -> dict[str, Entry]:
        """Returns what optimizers have of the parameters here; {} before one has stepped."""
        names = {id(parameter): name for name, parameter in self._here.items()}
        nothing = Entry(NOWHERE, {}, {}, {})
        # What has come and waits for its optimizer may have to go on before that steps.
        waiting = {n: e for n, e in self._waiting.items() if e is not None and n in self._here}
        found = dict.fromkeys(self._here, nothing) | waiting if self._known or waiting else {}
        for number, optimizer in self._living():
            for group_number, group in enumerate(optimizer.param_groups):
                options = {k: v for k, v in group.items() if _is_plain(v)}
                for parameter in group["params"]:
                    if id(parameter) in names:
                        place = (number, group_number)
                        found[names[id(parameter)]] = _entry(
                            place, options, optimizer.state, parameter
                        )
        return found

    # ------------------------------------------------------------ hooks

    def _before(self, optimizer: Optimizer) -> None:
        known = [other for _, other in self._living()]
        if any(optimizer is other for other in known) or not self._is_ours(optimizer):
            return
        self._known.append(weakref.ref(optimizer))
        self._rewire(len(self._known) - 1, optimizer)

    def _after(self, optimizer: Optimizer) -> None:
        if not any(optimizer is other for _, other in self._living()):
            return
        if not self._stepped or id(optimizer) in self._stepped:
            self.updates += 1
            self._stepped.clear()
        self._stepped.add(id(optimizer))
        self.steps += 1

    def _is_ours(self, optimizer: Optimizer) -> bool:
        return any(p in self._ours for group in optimizer.param_groups for p in group["params"])

    def _living(self) -> list[tuple[int, Optimizer]]:
        found = [(number, reference()) for number, reference in enumerate(self._known)]
        return [(number, optimizer) for number, optimizer in found if optimizer is not None]

    # ------------------------------------------------------------ groups and state

    def _rewire(self, number: int, optimizer: Optimizer) -> None:
        here = {id(parameter) for parameter in self._here.values()}
        for group in optimizer.param_groups:
            gone = [p for p in group["params"] if p in self._ours and id(p) not in here]
            for parameter in gone:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if not any(p is q for q in gone)]
        for name, entry in list(self._waiting.items()):
            place = self._place(optimizer, number, name, entry)
            if place == number:
                self._put(optimizer, name, entry)
                del self._waiting[name]
        if (
            not any(group["params"] for group in optimizer.param_groups)
            and self._unused is not None
        ):
            optimizer.param_groups[0]["params"] = [self._unused]

    def _place(self, optimizer: Optimizer, number: int, name: str, entry: Entry | None) -> int:
        """Returns the number of the optimizer that is to step a parameter."""
        if entry is not None:
            return entry.place[0]
        listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(self._here[name]) in listed:
            return number
        if len(optimizer.param_groups) > 1 or number > 0:
            raise DoraError(
                f"{name}: it came to this rank before the first optimizer.step(), so nobody knows "
                "which of several optimizers or groups is to step it: switch plans after that"
            )
        return number

    def _put(self, optimizer: Optimizer, name: str, entry: Entry | None) -> None:
        parameter = self._here[name]
        options = {} if entry is None else entry.options
        group_number = 0 if entry is None else entry.place[1]
        while len(optimizer.param_groups) <= group_number:
            optimizer.param_groups.append({**optimizer.defaults, **options, "params": []})
        listed = [q for group in optimizer.param_groups for q in group["params"]]
        if not any(parameter is other for other in listed):
            optimizer.param_groups[group_number]["params"].append(parameter)
        optimizer.state.pop(parameter, None)
        if entry is not None and (entry.scalars or entry.tensors):
            tensors = {key: _placed(value, parameter, key) for key, value in entry.tensors.items()}
            optimizer.state[parameter] = {**entry.scalars, **tensors}


def _calling(
    this: weakref.ref[Optimizers], method: Callable[[Optimizers, Optimizer], None]
) -> Callable[..., None]:
    def hook(optimizer: Optimizer, *_: Any) -> None:
        optimizers = this()
        if optimizers is not None:
            method(optimizers, optimizer)

    return hook


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _entry(
    place: tuple[int, int], options: dict[str, Any], states: Mapping[Any, Any], parameter: Any
) -> Entry:
    state = states.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    scalars = {key: value for key, value in state.items() if key not in tensors}
    for key, value in scalars.items():
        if not _is_plain(value):
            raise DoraError(
                f"optimizer state {key}: given a {type(value).__name__}, allowed where stages "
                "move: tensors and plain numbers"
            )
    return Entry(place, options, scalars, tensors)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, _SCALARS) for item in value)
    return isinstance(value, _SCALARS)


def _placed(value: torch.Tensor, parameter: nn.Parameter, key: str) -> torch.Tensor:
    """Returns state on its parameter's device; counts of steps stay on the CPU, as in torch."""
    return value if key == "step" else value.to(parameter.device)
