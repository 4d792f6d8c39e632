"""Takes a device into a running job, between two calls, with nothing at risk until it is in.

All members open a second set of connections, among themselves and with the newcomer, beside those
they have. Only when everybody has all of them does the job go over: until then a newcomer that
fails costs a few seconds and nothing else, and from then on it is lost like any other device.

`Admission` is what the members do; `joining.py` is the newcomer's side.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from dora._C import Engine
from dora.errors import DoraError, InfeasiblePlanError
from dora.runtime.boundary import digest
from dora.runtime.clock import clock_offset_s
from dora.runtime.door import AGAIN, WAIT, Door, Knock, Notice, proof
from dora.runtime.rendezvous import Links, connect
from dora.runtime.replan import choose_plan
from dora.spec import Plan

if TYPE_CHECKING:
    from dora.runtime.recovery import Recovery

# Of the second connections: the newcomer was alive seconds ago, and the job waits meanwhile.
_CONNECT_S = 10.0
# Memory is checked on every device before it goes over to a plan.
_ANY_BYTES = 1 << 62

Addresses = Mapping[int, tuple[str, int]]


class Guest(NamedTuple):
    """Who comes in, and the connections with it."""

    knock: Knock
    engine: Engine


class Admission:
    """What the members of one job do about newcomers.

    Args:
        recovery: Of the model.
    """

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery
        self._model = recovery.model
        self._place = recovery.transport.communicator.place
        self._opened: Engine | None = None
        self._current: Knock | None = None
        key = self._place.membership.key
        self.door = Door(self._place.store, key, self._judge)

    # ------------------------------------------------------------ who may come

    def open(self) -> None:
        """Tells where the job is, on the lowest member."""
        model, place = self._model, self._recovery.transport.communicator.place
        if model.rank != model.members[0]:
            return
        membership = place.membership
        self.door.open(
            Notice(
                job=membership.job,
                epoch=place.epoch,
                members=model.members,
                seats=len(model.plan.devices),
                machine=membership.machine,
                address=membership.address,
                key=membership.made_key,
                proof=proof(membership.key, membership.job),
            )
        )

    def _judge(self, knock: Knock) -> str:
        """Answers a door; runs on its thread."""
        model, communicator = self._model, self._recovery.transport.communicator
        if knock.digest != self._recovery.digest:
            return (
                "its module or options differ, allowed: the same as on the ranks that run "
                "(module, snapshot_interval, outputs_to, batch_dim, loss_reduction)"
            )
        if knock.rank in model.members:
            if knock.rank in self._recovery.watch.lost:
                return WAIT  # until the others have agreed on it
            return f"rank {knock.rank} is alive, allowed: a rank that is gone; end that process"
        return "" if knock.epoch == communicator.place.epoch + 1 else AGAIN

    def is_knocked(self) -> bool:
        """Tells whether somebody waits, other than who comes in just now; on the lowest member."""
        return self.door.guest not in (None, self._current)

    # ------------------------------------------------------------ before it is in

    def prepare(self) -> Guest | None:
        """Connects all members with who knocks, beside the connections they have; collective.

        Returns:
            The guest; None if there is none, or somebody could not reach it.
        """
        self._discard()
        model = self._model
        is_host = model.rank == model.members[0]
        mine = self._current = self.door.guest if is_host else None
        said = model._agreement.gather(json.dumps(mine).encode(), "admission")[0]
        if json.loads(said) is None:
            return None
        knock = Knock(*json.loads(said))
        addresses = self._addresses(knock)
        is_well = len(addresses) == len(model.members) and self._connect(knock, addresses, is_host)
        rows = model._agreement.rows([float(is_well)], "admission")
        if all(row[0] for row in rows) and self._opened is not None:
            guest = Guest(knock, self._opened)
            self._opened = None
            return guest
        self._discard()
        if is_host:
            self.door.done(knock)
            self.door.answer(knock, {AGAIN: True})
        return None

    def _addresses(self, knock: Knock) -> dict[int, tuple[str, int]]:
        """Returns where the members listen, as far as they can."""
        model, place = self._model, self._place
        mine: tuple[str, int] | None = None
        try:
            self._opened = place.engine(model.rank, knock.epoch)
            mine = place.membership.address, self._opened.port
        except (OSError, RuntimeError):  # told to all: nobody comes in
            self._opened = None
        said = model._agreement.gather(json.dumps(mine).encode(), "admission")
        found = dict(zip(model.members, map(json.loads, said), strict=True))
        return {rank: (at[0], at[1]) for rank, at in found.items() if at is not None}

    def _connect(self, knock: Knock, addresses: Addresses, is_host: bool) -> bool:
        model, engine = self._model, self._opened
        assert engine is not None
        peers = {rank: at for rank, at in addresses.items() if rank != model.rank}
        try:
            if is_host:
                self.door.answer(
                    knock,
                    {
                        "addresses": list(addresses.items()),
                        "host": model.rank,
                        "turn": self._recovery.transport.turn,
                    },
                )
            peers[knock.rank] = knock.address, knock.port
            connect(engine, model.rank, peers, Links(), min(_CONNECT_S, model.timeout_s))
        except DoraError:
            return False
        return True

    def _discard(self) -> None:
        if self._opened is not None:
            self._opened.close(0.0)
            self._opened = None

    # ------------------------------------------------------------ once it is in

    def welcome(self, guest: Guest, kind: str, start_s: float) -> None:
        """Goes over to the connections with the guest, and to the plan for all of them."""
        recovery, model = self._recovery, self._model
        host = model.members[0]
        close_before = go_over(
            recovery,
            guest.engine,
            epoch=guest.knock.epoch,
            members=sorted({*model.members, guest.knock.rank}),
            seats=len(model.plan.devices),
        )
        facts = self._facts(kind) if model.rank == host else {}
        said = recovery.run("welcome", lambda: exchange(model, facts, host, guest.knock.rank))
        close_before()
        self.door.done(guest.knock)
        model._take(model.resident[0], {}, model.resident[1:])
        settle(recovery, said["target"], guest.knock.rank, start_s)

    def _facts(self, kind: str) -> dict[str, Any]:
        model, recovery = self._model, self._recovery
        members = model.members
        target = self._target(members)
        return {
            "resident": [plan.to_json() for plan in model.resident],
            "target": target.to_json() if target is not None else "",
            "seed": model._seed,
            "clock_offset_s": model._clock_offset_s,
            "call": model._calls,
            "counts": [model.step_count, model.request_count],
            "kind": kind,
            "recovery": recovery.state(),
        }

    def _target(self, members: tuple[int, ...]) -> Plan | None:
        """Returns the plan to go over to: the one that these have run, or one that is close to it.

        Otherwise that of the fewest more, without those: what a loss of them would have led to.
        """
        plans = self._recovery.plans
        known = [there for there in plans if set(members) <= set(there)]
        if not known:
            return None
        nearest = min(known, key=len)
        plan = plans[nearest]
        names = plan.devices
        gone = tuple(name for rank, name in enumerate(names) if rank not in members)
        limits = dict.fromkeys(names, _ANY_BYTES)
        try:
            return choose_plan(plan, self._model.chain, gone, limits, self._recovery.policy)
        except ValueError:
            return None


def go_over(
    recovery: Recovery,
    engine: Engine,
    *,
    epoch: int,
    members: Sequence[int],
    seats: int,
) -> Callable[[], None]:
    """Uses other connections from now on; returns what closes those before.

    Args:
        recovery: Of the model.
        engine: Connected with all members.
        epoch: Of its connections.
        members: From now on.
        seats: Ranks that there may be.
    """
    model, transport = recovery.model, recovery.transport
    transport.interrupt("a device joins")  # nothing is under way but copies
    recovery.copies.snapshots.drop()
    recovery.watch.close()
    close = transport.move(engine, epoch, seats)
    transport.join(transport.turn, epoch)
    recovery.watch = recovery.watch.moved(transport.number("notes"), members)
    model._fetched.interrupted()
    model._join(members)
    return close


def job_digest(model: Any, snapshot_interval: int) -> int:
    """Returns a number that differs where modules or options do that all ranks have to share."""
    module = model.chain.module
    named = [*module.named_parameters(), *module.named_buffers()]
    tensors = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]
    options = (
        snapshot_interval,
        model._outputs_to,
        model._batch_dim,
        model._whole_inputs,
        model._loss_reduction,
        model._is_checkpointing,
    )
    return digest(f"{tensors} {model.chain.calls} {model.chain.num_blocks} {options}")


def exchange(model: Any, facts: Mapping[str, Any], host: int, guest: int) -> dict[str, Any]:
    """Returns the facts of the host; gives the guest the time of the clock, too.

    Once one of the two is lost, nothing is to be told any more.
    """
    if not {host, guest} <= set(model.members):
        return {"target": ""}
    said = model._agreement.gather(json.dumps(facts).encode(), "welcome")
    told: dict[str, Any] = json.loads(said[model.members.index(host)])
    if model.rank in (host, guest):
        told["clock_offset_s"] += clock_offset_s(
            model.transport, model.rank, [guest], model.timeout_s, server=host
        )
    return told


def settle(recovery: Recovery, target: str, guest: int, start_s: float) -> None:
    """Goes over to a plan with the newcomer, on all ranks, if there is one that fits."""
    model = recovery.model
    recovery.come_together()
    if guest not in model.members:
        return
    num_bytes = 0
    plan = Plan.from_json(target) if target else model.plan
    if plan != model.plan:
        with suppress(InfeasiblePlanError):  # then the newcomer stays idle
            num_bytes = model._agreed("switch", [plan], model._move_to)
    gone = tuple(d for r, d in enumerate(model.plan.devices) if r not in model.members)
    text = f"rank {guest} ({model.plan.devices[guest]}) has joined"
    model._tell("join", start_s, devices=gone, num_bytes=num_bytes, text=text)


def take_in(recovery: Recovery, kind: str) -> bool:
    """Takes in all that knock; a collective call; returns whether somebody came."""
    has_come = False
    while recovery.is_knocked:
        start_s = time.perf_counter()
        recovery.is_knocked = False
        guest = recovery.run("admission", recovery.admission.prepare)
        if guest is not None:
            recovery.admission.welcome(guest, kind, start_s)
            has_come = True
    return has_come
