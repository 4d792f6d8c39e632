"""Plans whose weights are in place together: going over from one to another moves nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import psutil

from dora.errors import InfeasiblePlanError
from dora.partition import Chain
from dora.runtime.agreement import Agreement
from dora.runtime.checks import memory_bytes
from dora.runtime.guard import GuardedExecutor
from dora.runtime.placement import holders
from dora.runtime.spread import SpreadModule
from dora.runtime.turn import Turn
from dora.spec import Plan


class Seat(NamedTuple):
    """What runs one plan on this rank: what `DoraParallel` changes when it turns to it."""

    plan: Plan
    executor: GuardedExecutor
    schedules: dict[tuple[bool, int, int], Turn]


class ResidentModule(SpreadModule):
    """Goes from one of several plans to another; `DoraParallel` makes the other attributes.

    Attributes:
        plan: The current placement.
        resident: It, or all plans of `hold`.
    """

    plan: Plan
    resident: tuple[Plan, ...]
    members: tuple[int, ...]
    _outputs_to: Literal["all"] | int
    _executor: GuardedExecutor
    _schedules: dict[tuple[bool, int, int], Turn]
    _output_ranks: tuple[int, ...]
    _make_executor: Callable[[Plan], GuardedExecutor]
    _agreed: Callable[..., Any]
    _move_to: Callable[..., int]
    _tell: Callable[..., None]
    switch: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        self._seats: tuple[Seat, ...] = ()

    @property
    def output_ranks(self) -> tuple[int, ...]:
        """Ranks that get the output of a forward call."""
        wanted = self.members if self._outputs_to == "all" else (self._outputs_to,)
        return tuple(rank for rank in wanted if rank in self.members)

    def hold(self, plans: Sequence[Plan], *, reason: str = "") -> None:
        """Puts the weights of several plans in place; a collective call between requests.

        For inference. The first plan runs at first; `turn_to` goes over to another one and moves
        nothing. `switch`, `step` and the loss of a device end that.

        Args:
            plans: For the same devices and model.
            reason: For `events`.

        Raises:
            InfeasiblePlanError: They do not fit together; the model goes on as it was.
            ProtocolError: Ranks were given different plans.
        """
        start_s = time.perf_counter()
        num_bytes = self._agreed("hold", plans, self._move_to)
        self._tell("hold", start_s, num_bytes=num_bytes, text=reason)

    def turn_to(self, plan: Plan) -> None:
        """Gives the next requests to another plan of `hold`: on all ranks before the same one."""
        if plan is not self.plan:
            self._sit(_seat_of(plan, self._seats))

    def reorder(self, plan: Plan, *, reason: str = "") -> None:
        """Sends in the order of this plan's transfers: on all ranks before the same call.

        Args:
            plan: The current one but for its transfers, so that nothing has to be agreed upon.
            reason: For `events`.
        """
        start_s = time.perf_counter()
        self.plan, self.resident, self._executor.plan = plan, (plan,), plan
        self._schedules = {}
        self._tell("reschedule", start_s, text=reason)

    def _seat_all(self) -> None:
        """Makes what runs each of several plans; nobody sums gradients then."""
        self._seats = ()
        if len(self.resident) > 1:
            made = [self._make_executor(plan) for plan in self.resident]
            for executor in (self._executor, *made):
                executor.reducer.close()
            pairs = zip(self.resident, made, strict=True)
            self._seats = tuple(Seat(plan, executor, {}) for plan, executor in pairs)
            self._sit(self._seats[0])

    def _sit(self, seat: Seat) -> None:
        self.plan, self._executor, self._schedules = seat

    def _stand_alone(self) -> None:
        """Ends `hold`, where weights are going to change."""
        if self._seats:
            self.switch(self.plan, reason="training")


def _seat_of(plan: Plan, seats: Sequence[Seat]) -> Seat:
    """Returns the seat of a plan, by identity where that is known: plans are long to compare."""
    for seat in (*(s for s in seats if s.plan is plan), *(s for s in seats if s.plan == plan)):
        return seat
    raise ValueError("plan: given one that is not held, allowed: those of hold()")


def check_room(
    plans: Sequence[Plan],
    chain: Chain,
    rank: int,
    memory_limit_bytes: int | None,
    agreement: Agreement,
) -> None:
    """Raises InfeasiblePlanError on all ranks if the plans do not fit one of them together."""
    limit = memory_limit_bytes or psutil.virtual_memory().total
    rows = agreement.rows([need_bytes(plans, chain, rank), limit], "room for the plans")
    for other, (needed, allowed) in zip(agreement.members, rows, strict=True):
        if needed > allowed:
            raise InfeasiblePlanError(
                f"plans: device {plans[0].devices[other]} (rank {other}) needs at least "
                f"{needed / 1e6:.1f} MB to hold all {len(plans)}, allowed {allowed / 1e6:.1f} MB: "
                "hold fewer of them"
            )


def need_bytes(plans: Sequence[Plan], chain: Chain, rank: int) -> int:
    """Returns the most that one of the plans needs, with the weights of the others beside it."""
    tensors: dict[str, Any] = dict(chain.module.named_parameters(remove_duplicate=False))
    held = [
        {name for name, ranks in holders(chain.parameters.blocks, plan).items() if rank in ranks}
        for plan in plans
    ]
    every = set().union(*held)
    needed = [
        memory_bytes(plan, chain, rank) + sum(int(tensors[name].nbytes) for name in every - own)
        for plan, own in zip(plans, held, strict=True)
    ]
    return max(needed)
