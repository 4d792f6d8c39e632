"""Changes the plan of a running model: the same processes, another placement."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from dora.errors import DoraError, InfeasiblePlanError, ProtocolError
from dora.live import Watch
from dora.runtime.agreement import Agreement
from dora.runtime.boundary import digest
from dora.runtime.checks import check_agreed, check_plan
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.events import Event
from dora.runtime.migration import Carrier, Shipment, media_between, shipments
from dora.runtime.optimizers import Optimizers
from dora.runtime.parcel import Layout, Parcel
from dora.runtime.priority import GRADIENT
from dora.runtime.recovery import Recovery
from dora.runtime.replan import Policy, is_without
from dora.runtime.resident import ResidentModule, check_room
from dora.runtime.tags import FETCH_AHEAD_TAG, MOVE_TAG
from dora.runtime.transport import Transport
from dora.spec import Plan

_MAX_EVENTS = 10_000


class Adapter(Protocol):
    """Chooses the plans of a model while it runs; `dora.adapt.adapting` makes one."""

    def between_calls(self, model: Any) -> None:
        """May `confer`, `switch` and `prepare`; comes before every call but the first."""


def adapter_of(given: Adapter | str | None, plan: Any, *, is_lasting: bool) -> Adapter | None:
    """Returns the adapter of a model: for 'auto' that of whoever made the plan, if it has one."""
    if isinstance(given, str) and given not in ("auto", "off"):
        raise ValueError(f"adapter: given {given!r}, allowed: 'auto', 'off' or an adapter")
    if given == "auto":
        given = plan.adapter(is_lasting=is_lasting) if hasattr(plan, "adapter") else None
    return None if isinstance(given, str) else given


class AdaptiveModule(ResidentModule):
    """Switches plans; `DoraParallel` makes the other attributes.

    Attributes:
        plan: The current placement.
        members: Ranks that take part.
        events: The last switches, losses and departures.
        on_event: Called with each of them.
        step_count, request_count: Calls that have ended since the job began, of `step` and of the
            model or `generate`; those of the others on a rank that has come later.
        watch: Tells others how this rank is doing; `dora.live.watching` sets it.
    """

    plan: Plan
    members: tuple[int, ...]
    timeout_s: float
    transport: Transport
    _memory_limit_bytes: int | None
    _outputs_to: Literal["all"] | int
    _calls: int
    _failed: str | None
    _world_size: int

    def __init__(self) -> None:
        super().__init__()
        self.events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self.on_event: Callable[[Event], None] | None = None
        self.watch: Watch | None = None
        self.step_count = self.request_count = 0
        self._first_kind = ""  # of the call that has to come first, where this rank has joined
        self._optimizers = Optimizers()
        self._recovery: Recovery | None = None
        self._changes: dict[str, int] = {}  # of what was sent ahead, as it was then

    def _settle(self) -> None:
        raise NotImplementedError

    def _survive(self, policy: Policy | None) -> None:
        """Goes on after losses from now on, if there is a policy for them."""
        if policy is None:
            return
        if not isinstance(self.transport, EngineTransport):
            raise ValueError(
                "snapshot_interval: given for another transport, allowed: with 'dora' only, since "
                "the others can not go on without a rank"
            )
        self._recovery = Recovery(self, self.transport, policy)
        self._recovery.admission.open()

    def _call(self, kind: str, attempt: Callable[[], Any]) -> Any:
        if self._recovery is None or self._failed is not None:
            result = super()._call(kind, attempt)
        else:
            self._check_first(kind)
            result = self._recovery.run(kind, attempt)
        self.step_count += kind == "train"
        self.request_count += kind in ("infer", "generate")
        return result

    def _check_first(self, kind: str) -> None:
        """Refuses what the other ranks do not call, where this one has just joined them."""
        first, self._first_kind = self._first_kind, ""
        if first and kind != first:
            self.close()
            raise ProtocolError(
                f"rank {self.rank}: given {kind!r} as the first call after joining a job, "
                f"allowed: {first!r}, which its other ranks call next"
            )

    def _take_in(self, kind: str) -> bool:
        """Takes in the devices that want to; returns whether one came. Before calls of the user."""
        is_running = self._recovery is not None and self._failed is None
        return is_running and self._recovery.take_in(kind)  # type: ignore[union-attr]

    def _loaded(self) -> None:
        self._fetched.forget()
        if self._recovery is not None:
            self._check_first("load")
            self._recovery.loaded()

    # ------------------------------------------------------------ leaving

    def snapshot(self) -> None:
        """Takes a snapshot and waits until all ranks have it; a collective call."""
        self._recovering().snapshot()

    def leave(self) -> None:
        """Takes this device out of the job, with nothing lost; the others go on without it.

        Call it on the device that goes, where the others call `step` or the model next. It returns
        once they have what they need; then this model can not be used any more.
        """
        self._recovering().leave()
        if self.watch is not None:  # before it looks like a failure
            self.watch.close()
        self._failed = "this device has left"
        self.close()

    def close(self) -> None:
        """Ends the connections of this rank."""
        if self._recovery is not None:
            self._recovery.close(has_ended=self._failed is None)
        self.transport.close()
        if self.watch is not None:
            self.watch.close(self._failed or "")

    def _recovering(self) -> Recovery:
        if self._recovery is None:
            raise RuntimeError(
                "this needs a DoraParallel that survives losses: give it snapshot_interval"
            )
        return self._recovery

    # ------------------------------------------------------------ switching

    def confer(
        self,
        row: Sequence[float],
        answer: Callable[[list[list[float]]], bytes],
        is_asked: Callable[[list[list[float]]], bool] = lambda rows: True,
    ) -> tuple[list[list[float]], bytes]:
        """Tells all ranks some numbers, and what the lowest one says to them; a collective call.

        Args:
            row: Of this rank, equally long on all.
            answer: Of the rows of all `members`, in their order; asked on the lowest rank only.
            is_asked: Whether it is asked at all, of the same rows.
        """

        def attempt() -> tuple[list[list[float]], bytes]:
            rows = self._agreement.rows(row, "adapter")
            if not is_asked(rows):
                return rows, b""
            said = answer(rows) if self.rank == self.members[0] else b""
            return rows, self._agreement.gather(said, "adapter")[0]

        told: tuple[list[list[float]], bytes] = self._call("adapt", attempt)
        return told

    def switch(self, plan: Plan, *, reason: str = "") -> None:
        """Goes on with another plan; a collective call between steps and requests.

        Weights, buffers, gradients and optimizer state go where they are missing. The user's
        optimizers step the new parameters from then on; so `model.parameters()` must be asked anew.

        Args:
            plan: For the same devices and model; ranks that it leaves out keep nothing.
            reason: For `events`.

        Raises:
            InfeasiblePlanError: The plan does not fit; the model goes on with the old one.
            ProtocolError: Ranks were given different plans.
        """
        start_s = time.perf_counter()
        num_bytes = self._agreed("switch", [plan], self._move_to)
        self._tell("switch", start_s, num_bytes=num_bytes, text=reason)

    def prepare(self, plan: Plan) -> None:
        """Starts to fetch what `switch(plan)` would have to; collective, but returns at once.

        It moves in the background at the lowest priority while steps and requests go on. Parameters
        that an optimizer steps are left out: they will have changed. What was interrupted goes on
        with the next call.
        """
        self._agreed("prepare", [plan], self._fetch_ahead)

    def _agreed(self, kind: str, plans: Sequence[Plan], change: Callable[..., Any]) -> Any:
        """Runs `change` if the plans fit; else all ranks raise the same error, and go on."""

        def attempt() -> Any:
            try:
                self._check_same(plans)
                for plan in plans:
                    self._check(plan)
                if len(plans) > 1:
                    limit = self._memory_limit_bytes
                    check_room(plans, self.chain, self.rank, limit, self._agreement)
            except (InfeasiblePlanError, ProtocolError) as refusal:
                return refusal
            return change(*plans)

        result = self._call(kind, attempt)
        if isinstance(result, DoraError):
            raise result
        return result

    def _check_same(self, plans: Sequence[Plan]) -> None:
        text = " ".join(plan.to_json() for plan in plans)
        digests = self._agreement.rows([digest(text) >> 12], "check of the plan")
        if any(row != digests[0] for row in digests):
            raise ProtocolError("plan: ranks were given different plans, allowed: the same on all")

    def _check(self, plan: Plan) -> None:
        check_plan(plan, self.chain, self._world_size)
        check_agreed(plan, self.chain, self.rank, self._memory_limit_bytes, self._agreement)
        gone = [name for i, name in enumerate(plan.devices) if i not in self.members]
        if not is_without(plan, gone):
            raise InfeasiblePlanError(f"plan: uses {', '.join(gone)}, which are not there")

    def _move_to(self, *plans: Plan) -> int:
        here = {n for n, ranks in self._state.holders.items() if self.rank in ranks}
        supply = self._supply(*plans)
        return self._relocate(plans[0], supply, here, self._agreement, beside=plans[1:])

    def _supply(self, *plans: Plan) -> dict[str, Parcel]:
        """Returns what other ranks may need of this one."""
        old, new = self._state.holders, self._state.holders_in(*plans)
        names = [name for name in old if not set(new[name]) <= set(old[name])]
        return self._state.parcels(names, self._optimizers.entries())

    def _relocate(
        self,
        plan: Plan,
        supply: Mapping[str, Parcel],
        here: Collection[str],
        together: Agreement,
        beside: Sequence[Plan] = (),
    ) -> int:
        """Brings every tensor to where the plan wants it; a collective call.

        Args:
            plan: The new placement, for the members.
            supply: What this rank can send, or set its own tensors back to.
            here: Tensors of this rank that are as they should be.
            together: Of all ranks that give or get something.
            beside: Placements that are held with it.

        Returns:
            Bytes that this rank got.
        """
        stale = [n for n, version in self._changes.items() if self._change(n) != version]
        table = self._gather(
            {
                "layouts": {name: parcel.layout() for name, parcel in supply.items()},
                "here": sorted(here),
                "fetched": self._fetched.names(),
                "stale": stale,
            },
            together,
        )
        changed = {name for row in table.values() for name in row["stale"]}
        has = {r: {*row["here"], *(set(row["fetched"]) - changed)} for r, row in table.items()}
        new = self._state.holders_in(plan, *beside)
        needed = {n: [r for r in ranks if n not in has[r]] for n, ranks in new.items()}
        suppliers = {n: [r for r, row in table.items() if n in row["layouts"]] for n in new}
        moves = shipments(needed, suppliers, media_between(plan))
        # All steps wait for it, and snapshots need not come first.
        carrier = Carrier(self.transport, self.rank, MOVE_TAG, self.timeout_s, priority=GRADIENT)
        carrier.start(moves, supply, self._layouts(moves, table), {})
        arrived = carrier.collect([move.name for move in moves if move.dst == self.rank])
        num_bytes = sum(parcel.num_bytes for parcel in arrived.values())
        mine = {n for n, ranks in new.items() if self.rank in ranks} - set(here)
        ahead = self._fetched.collect([n for n in table[self.rank]["fetched"] if n in mine])
        self._changes.clear()
        arrived.update((n, parcel) for n, parcel in ahead.items() if n not in changed)
        arrived.update((n, supply[n].copy()) for n in mine if n not in arrived)
        if self._recovery is not None:
            self._recovery.keep(supply)
        self._take(plan, arrived, beside)
        return num_bytes

    def _take(self, plan: Plan, arrived: Mapping[str, Parcel], beside: Sequence[Plan] = ()) -> None:
        """Holds what the plan wants of this rank from now on, and those beside it."""
        self.plan, self.resident = plan, (plan, *beside)
        self._state.move(plan, self.members, arrived, beside)
        parameters = self._state.parameters
        entries = {n: parcel.entry() for n, parcel in arrived.items() if n in parameters}
        self._optimizers.hold(parameters, entries, None if parameters else self._unused)
        if self.rank in self.members:
            self._settle()
            self._seat_all()

    def _join(self, members: Sequence[int]) -> None:
        """Goes on with these ranks only."""
        self.members = tuple(members)
        self._agreement = Agreement(self.transport, self.rank, self.members, self.timeout_s)

    # ------------------------------------------------------------ fetching ahead

    def _fetch_ahead(self, plan: Plan) -> None:
        supply = self._unchanging(plan)
        here = [n for n, ranks in self._state.holders.items() if self.rank in ranks]
        table = self._gather(
            {
                "layouts": {name: parcel.layout() for name, parcel in supply.items()},
                "has": [*here, *self._fetched.names()],
                "progress": self._fetched.progress(),
            },
            self._agreement,
        )
        new = self._state.holders_in(plan)
        suppliers = {n: [r for r, row in table.items() if n in row["layouts"]] for n in new}
        has = {rank: set(row["has"]) for rank, row in table.items()}
        needed = {
            n: [r for r in ranks if n not in has[r]] for n, ranks in new.items() if suppliers[n]
        }
        moves = shipments(needed, suppliers, media_between(plan))
        self._changes.update({m.name: self._change(m.name) for m in moves if m.src == self.rank})
        progress = {rank: row["progress"] for rank, row in table.items()}
        self._fetched.start(moves, supply, self._layouts(moves, table), progress)

    def _unchanging(self, plan: Plan) -> dict[str, Parcel]:
        """Returns what other ranks may need and no optimizer will change."""
        trained = {n for n, p in self._state.parameters.items() if p.requires_grad}
        changing = trained if self._optimizers.steps else {}
        parcels = self._supply(plan).items()
        return {n: p for n, p in parcels if n not in changing and p.grad is None}

    def _layouts(self, moves: Sequence[Shipment], table: Mapping[int, Any]) -> dict[str, Layout]:
        """Returns what comes to this rank, as their senders describe it."""
        return {m.name: table[m.src]["layouts"][m.name] for m in moves if m.dst == self.rank}

    @property
    def _fetched(self) -> Carrier:
        if self._ahead is None:
            self._ahead = Carrier(self.transport, self.rank, FETCH_AHEAD_TAG, self.timeout_s)
        return self._ahead

    _ahead: Carrier | None = None

    def _change(self, name: str) -> int:
        """Returns a number that changes with every change of a tensor in place."""
        tensor = self._state.here(name)
        if tensor is None or tensor.is_inference() or tensor.grad is not None:
            return -1
        return tensor._version

    # ------------------------------------------------------------ telling

    def _gather(self, row: dict[str, Any], together: Agreement) -> dict[int, Any]:
        """Returns what every rank of the agreement says, by rank."""
        said = together.gather(json.dumps(row).encode(), "placement")
        return dict(zip(together.members, map(json.loads, said), strict=True))

    def _tell(self, kind: str, start_s: float, **facts: Any) -> None:
        event = Event(kind, self._calls, start_s, time.perf_counter(), **facts)
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
