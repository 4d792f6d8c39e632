"""A device that comes to a running job, or comes back: how its `DoraParallel` is made.

It finds the job's notice in the rendezvous store, knocks, is connected, hears how far the others
are, and takes part from their next call on. Until it is in, a failure is its own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dora._C import Engine
from dora.errors import PeerLostError, ProtocolError, SpecError
from dora.runtime.admission import exchange, job_digest, settle, take_in
from dora.runtime.door import AGAIN, POLL_S, Knock, read_notice, seal, unseal
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.meeting import Place
from dora.runtime.recovery import Recovery
from dora.runtime.rendezvous import Links, connect
from dora.runtime.replan import Policy
from dora.runtime.state import ModelState
from dora.runtime.transport import Transport
from dora.spec import Plan

# A member may be lost at this very moment: the others go on without it first.
_ATTEMPTS = 3


def is_late(transport: Transport) -> bool:
    """Tells whether this rank comes to a job that runs already."""
    return (
        isinstance(transport, EngineTransport) and transport.communicator.place.notice is not None
    )


def come(model: Any, policy: Policy | None) -> None:
    """Joins the job that runs; blocks until its members are between two calls.

    Args:
        model: With its module cut, and a transport without peers.
        policy: Of the user.

    Raises:
        SpecError, ProtocolError: The job refuses this rank; the message says why.
        PeerLostError: It does not answer.
    """
    start_s = time.perf_counter()
    model._board.is_silent = True
    if policy is None:
        raise ProtocolError(
            f"rank {model.rank}: the job that runs takes in devices, given no snapshot_interval, "
            "allowed: the options of its other ranks"
        )
    for left in reversed(range(_ATTEMPTS)):
        try:
            facts = _Newcomer(model, policy).enter()
            break
        except PeerLostError:
            if not left:
                raise
    _take_over(model, policy, facts)
    recovery: Recovery = model._recovery
    recovery.run("welcome", lambda: None)
    model._board.is_silent = recovery.is_guest = False
    settle(recovery, facts["target"], model.rank, start_s)
    take_in(recovery, facts["kind"])
    model._first_kind = facts["kind"]


def _take_over(model: Any, policy: Policy, facts: dict[str, Any]) -> None:
    """Holds nothing, but knows all that the members know."""
    resident = [Plan.from_json(text) for text in facts["resident"]]
    model.plan = resident[0]
    model._world_size = len(model.plan.devices)
    model._state = ModelState(model.chain, model.plan, model.rank, model.transport, model.timeout_s)
    model._unused = nn.Parameter(torch.empty(0))
    model._seed, model._clock_offset_s = facts["seed"], facts["clock_offset_s"]
    model._calls = facts["call"]
    model.step_count, model.request_count = facts["counts"]
    model._take(resident[0], {}, resident[1:])
    model._recovery = Recovery(model, model.transport, policy)
    model._recovery.is_guest = True
    model._recovery.resume(facts["recovery"])


class _Newcomer:
    """One attempt to join."""

    def __init__(self, model: Any, policy: Policy) -> None:
        self._model = model
        self._transport: EngineTransport = model.transport
        self._place: Place = model.transport.communicator.place
        self._digest = job_digest(model, policy.snapshot_interval)
        self._nonce = ""

    def enter(self) -> dict[str, Any]:
        """Returns what the members tell, once this rank is connected with all of them."""
        reply, engine, epoch = self._ask()
        addresses = {rank: (host, port) for rank, (host, port) in reply["addresses"]}
        model = self._model
        connect(engine, model.rank, addresses, Links(), model.timeout_s)
        self._transport.interrupt("joining")
        self._transport.join(reply["turn"], epoch)
        model._join(sorted([*addresses, model.rank]))
        return exchange(model, {}, reply["host"], model.rank)

    def _ask(self) -> tuple[dict[str, Any], Engine, int]:
        """Knocks until the job answers."""
        while True:
            engine, epoch = self._listen()
            with self._store_errors():
                self._knock(engine, epoch)
                reply = self._await()
                self._tidy()
            if "refused" in reply:
                raise ProtocolError(f"{self._who}: joining was refused: {reply['refused']}")
            if AGAIN not in reply:
                return reply, engine, epoch

    @property
    def _who(self) -> str:
        return f"rank {self._model.rank}"

    def _listen(self) -> tuple[Engine, int]:
        """Opens connections of the epoch that comes next."""
        with self._store_errors():
            notice = read_notice(self._place.store)
        if notice is None:
            raise PeerLostError(f"{self._who}: joining failed: the job has ended")
        if self._model.rank >= notice.seats:
            raise SpecError(
                f"{self._who}: given for a job of {notice.seats} devices, allowed: ranks 0 to "
                f"{notice.seats - 1}; start the job with a plan that counts more devices"
            )
        epoch = notice.epoch + 1
        engine = self._place.engine(self._model.rank, epoch)
        close_before = self._transport.move(engine, epoch, notice.seats)
        close_before()
        return engine, epoch

    def _knock(self, engine: Engine, epoch: int) -> None:
        rank, store = self._model.rank, self._place.store
        membership = self._place.membership
        self._nonce = secrets.token_hex(16)
        knock = Knock(rank, self._nonce, epoch, membership.address, engine.port, self._digest)
        key = f"knock/{rank}"
        store.set(f"here/{self._nonce}", "0")
        store.set(key, seal(membership.key, key, knock))
        store.set("knock", "1")

    def _await(self) -> dict[str, Any]:
        """Returns the answer; raises PeerLostError if the job gives no sign of life."""
        store, nonce, timeout_s = self._place.store, self._nonce, self._model.timeout_s
        pulse, since_s, beats = b"", time.monotonic(), 0
        while time.monotonic() - since_s < timeout_s:
            if store.check([f"answer/{nonce}"]):
                sealed = store.get(f"answer/{nonce}")
                reply = unseal(self._place.membership.key, f"answer {nonce}", sealed)
                if reply is not None:
                    return dict(reply)
            beats += 1
            store.set(f"here/{nonce}", str(beats))
            if store.check([f"pulse/{nonce}"]):
                last, pulse = pulse, store.get(f"pulse/{nonce}")
                since_s = since_s if pulse == last else time.monotonic()
            time.sleep(POLL_S / 4)
        raise PeerLostError(
            f"{self._who}: joining failed: the job does not answer within {timeout_s:g} s "
            "(timeout_s); it has ended or hangs"
        )

    def _tidy(self) -> None:
        for key in ("answer", "pulse"):
            self._place.store.delete_key(f"{key}/{self._nonce}")

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except (PeerLostError, ProtocolError):
            raise
        except RuntimeError as error:
            raise PeerLostError(
                f"{self._who}: joining failed: the rendezvous store does not answer, its host has "
                f"ended: {str(error).splitlines()[0]}"
            ) from None
