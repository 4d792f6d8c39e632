"""Goes on without a device that was lost: from the last complete snapshot, with another plan.

Every collective call of the model runs through `Recovery.run`. When a peer is lost in it, the ranks
that are left agree on what they have (`verdict.py`), bring every tensor to where the new plan wants
it, and run the interrupted call again. A call that changes the model ends on all ranks or on none:
after it, all wait for all. Inference calls, which change nothing, may be a few apart; who is ahead
runs them again for the others, and keeps to itself what it has answered already.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch

from dora.errors import DoraError, PeerLostError
from dora.runtime.agreement import Agreement
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.membership import FAILURE, GivenUpError, Watch
from dora.runtime.parcel import Parcel
from dora.runtime.replan import Policy, choose_plan
from dora.runtime.rescue import write_rescue
from dora.runtime.snapshot import Snapshot, Snapshots, Version, keepers
from dora.runtime.undo import Undo
from dora.runtime.verdict import Report, Store, Verdict, decide
from dora.spec import Plan

# Inference calls that may be under way before all have ended the first of them. As many fill a
# pipeline of as many stages; what is kept of each are its inputs.
_MAX_OPEN = 8

# Failures of a device, which the others survive; any other one is the program's.
_OWN_FAILURES = (MemoryError, torch.OutOfMemoryError)


class _Logged(NamedTuple):
    position: int
    number: int
    attempt: Callable[[], Any]


@dataclass
class _Call:
    """A collective call under way.

    Attributes:
        kind: What it is.
        number: Of steps and requests before it.
        attempt: Runs it once.
        results: Its result, once this rank has done its part.
        undo: Takes back what the last attempt has done.
        is_over: It has ended on this rank.
    """

    kind: str
    number: int
    attempt: Callable[[], Any]
    results: list[Any] = field(default_factory=list)
    undo: Undo | None = None
    is_over: bool = False


class Recovery:
    """Keeps the calls of one model going.

    Args:
        model: A DoraParallel.
        transport: Its transport.
        policy: The user's wishes.
    """

    def __init__(self, model: Any, transport: EngineTransport, policy: Policy) -> None:
        self._model = model
        self._transport = transport
        self._policy = policy
        self._timeout_s: float = model.timeout_s
        self.watch = Watch(transport.communicator, transport.number("notes"), transport.interrupt)
        self.snapshots = Snapshots(transport, self._timeout_s)
        self._calls = 0  # training calls
        self._loads = 0
        self._due = True
        self._serial = 0  # of the snapshot that was begun last
        self._taken_at = 0  # updates
        self._open: deque[Callable[[], list[list[float]]]] = deque()
        self._log: deque[_Logged] = deque(maxlen=_MAX_OPEN + 1)
        self._kept: dict[str, Parcel] = {}
        self._is_torn = False

    @property
    def version(self) -> Version:
        """Of this rank's state, between calls."""
        return Version(self._model._optimizers.steps + self._loads, self._calls)

    # ------------------------------------------------------------ calls

    def run(self, kind: str, attempt: Callable[[], Any]) -> Any:
        """Runs a collective call until it has ended on all ranks that are left."""
        model = self._model
        call = _Call(kind, model._calls, attempt)
        failure: PeerLostError | None = None
        while True:
            try:
                if failure is not None:
                    self._recover(failure, call)
                    failure = None
                if not call.is_over:
                    self._try(call)
                return call.results[0]
            except GivenUpError as error:
                model._fail(error)
            except PeerLostError as error:
                failure = error
            except BaseException as error:
                self._fail(error)

    def _try(self, call: _Call) -> None:
        call.results, call.undo = [], None
        self._model._calls = call.number
        self._prepare(call.kind)
        call.undo = Undo(self._model._state) if call.kind == "train" else None
        call.results = [call.attempt()]
        self._commit(call.kind)
        self._end(call)

    def loaded(self) -> None:
        """Notes that the parameters are others now."""
        self._loads += 1
        self._due = True

    def keep(self, supply: Mapping[str, Parcel]) -> None:
        """Keeps what this rank is about to give away until all have what they need."""
        self._kept.update(supply)

    def leave(self) -> None:
        """Goes, once the others have what this rank holds."""
        failure = PeerLostError(f"rank {self._model.rank}: this device leaves")
        call = _Call("leave", self._model._calls, lambda: None)
        while True:
            try:
                return self._recover(failure, call)
            except GivenUpError as error:
                self._model._fail(error)
            except PeerLostError as error:
                failure = error

    def close(self) -> None:
        """Ends what runs in the background."""
        self.watch.close()
        self._transport.interrupt("this rank closed its connections")
        self.snapshots.stop()

    def snapshot(self) -> None:
        """Takes a snapshot now and waits until all ranks have it; a collective call."""
        self._due = True
        while self._due or self.snapshots.taking is not None:
            self.run("snapshot", lambda: time.sleep(0.001))
        last = self.snapshots.complete
        if last is None or last.version != self.version:
            raise DoraError(f"snapshot: not complete within {self._timeout_s:g} s (timeout_s)")

    def _prepare(self, kind: str) -> None:
        reason = self.watch.alarm()
        if reason is not None:
            raise PeerLostError(f"rank {self._model.rank}: {kind} failed: {reason}")
        while len(self._open) >= (_MAX_OPEN if kind == "infer" else 1):
            self._learn(self._open.popleft()())
        has_snapshots = self._policy.snapshot_interval > 0 and kind in ("train", "infer")
        if (has_snapshots or kind == "snapshot") and self._is_due(kind):
            self._take(kind)

    def _commit(self, kind: str) -> None:
        """Waits until all have ended the call, or lets inference calls be open for a while."""
        taking = self.snapshots.taking
        done = self._serial - (taking is not None and not taking.is_done)
        if taking is not None and taking.is_failed:
            done = -1
        rows = self._model._agreement.start_rows([done], f"end of {kind}")
        if kind == "infer":
            self._open.append(rows)
        else:
            self._learn(rows())

    def _learn(self, rows: list[list[float]]) -> None:
        oldest = min(row[0] for row in rows)
        if self.snapshots.taking is not None and oldest == self._serial:
            self.snapshots.keep()
        elif oldest < 0:
            self.snapshots.drop()

    def _end(self, call: _Call) -> None:
        call.is_over = True
        self.watch.position += 1
        self._calls += call.kind == "train"
        if call.kind == "infer":
            self._log.append(_Logged(self.watch.position, call.number, call.attempt))
        else:
            self._kept.clear()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, _OWN_FAILURES):
            rank = self._model.rank
            text = f"first failure, on rank {rank}: {type(error).__name__}: {error}"
            self.watch.tell_all(FAILURE, 0, text)
        self._model._fail(error)

    # ------------------------------------------------------------ snapshots

    def _is_due(self, kind: str) -> bool:
        if self.snapshots.taking is not None:
            return False
        last, interval = self.snapshots.complete, self._policy.snapshot_interval
        is_old = 0 < interval <= self._model._optimizers.updates - self._taken_at
        is_partial = kind == "train" and last is not None and not last.is_whole
        return self._due or is_old or is_partial

    def _take(self, kind: str) -> None:
        model = self._model
        state, rank = model._state, model.rank
        updates = model._optimizers.updates
        self._due, self._taken_at = False, updates
        self._serial += 1
        is_whole = kind != "infer" or updates > 0
        mine = [n for n, ranks in state.holders.items() if rank in ranks]
        parcels = state.parcels(mine, model._optimizers.entries())
        if is_whole:
            parcels = {name: parcel.copy() for name, parcel in parcels.items()}
        keeper = keepers(model.plan, model.members)
        only = {n: ranks[0] for n, ranks in state.holders.items() if len(ranks) == 1}
        of = [r for r, k in keeper.items() if k == rank and r in only.values()]
        outgoing = {n: p for n, p in parcels.items() if n in only and rank in keeper}
        self.snapshots.begin(
            Snapshot(self.version, updates, parcels if is_whole else {}, is_whole=is_whole),
            outgoing,
            keeper[rank] if outgoing else None,
            of,
        )

    # ------------------------------------------------------------ after a loss

    def _recover(self, failure: PeerLostError, call: _Call) -> None:
        """Goes on with those who are left; ends the interrupted call if it counts as done."""
        start_s = time.perf_counter()
        self._transport.interrupt(str(failure))
        self.snapshots.stop()
        report = self._report(call)
        number, fields = self.watch.agree(
            report,
            lambda bodies: self._decide(_reports(bodies)),
            patience_s=self._timeout_s,
            is_polite=call.kind == "leave",
        )
        verdict = Verdict.read(fields[1])
        is_complete = report.is_complete(verdict.top)
        self._check(verdict, call)
        if is_complete:
            self._end(call)
        elif not call.is_over:
            self._model._calls = call.number
            if call.undo is not None:
                call.undo.apply()
                call.undo = None
        self._begin_anew(f"{number}.{fields[0]}", verdict)
        self._serial = number << 20  # some have begun a snapshot that others have not
        self._restore(verdict, is_again=call.kind == "train" and not call.is_over)
        self._tell(verdict, start_s, str(failure))
        if call.kind != "leave":
            self._replay(verdict)

    def _report(self, call: _Call) -> Report:
        model = self._model
        before = call.undo or Undo(model._state)
        return Report(
            position=self.watch.position,
            kind="over" if call.is_over else call.kind,
            has_result=bool(call.results) and not call.is_over,
            is_leaving=call.kind == "leave",
            version=self.version,
            updates=model._optimizers.updates,
            here=() if self._is_torn else tuple(dict.fromkeys([*self._here(), *self._kept])),
            stores=tuple(
                Store(s.version, s.updates, tuple(s.parcels())) for s in self.snapshots.all()
            ),
            limit_bytes=model._memory_limit_bytes or psutil.virtual_memory().total,
            has_grads=before.has_grads(),
        )

    def _decide(self, reports: Mapping[int, Report]) -> Any:
        model, watch = self._model, self.watch
        verdict = decide(
            reports, list(model._state.holders), model.plan.devices, self._replan, watch.silent()
        )
        if not verdict.error:
            claimed = model._board.claim(f"after round {watch.round}", verdict.members)
            if model.rank in verdict.members and model.rank not in claimed:
                verdict = Verdict(tuple(reports), error=f"ranks {claimed} go on without this one")
        return model.rank, verdict

    def _replan(self, gone: tuple[str, ...], reports: Mapping[int, Report]) -> str:
        model = self._model
        limits = {model.plan.devices[r]: report.limit_bytes for r, report in reports.items()}
        return choose_plan(model.plan, model.chain, gone, limits, self._policy).to_json()

    def _check(self, verdict: Verdict, call: _Call) -> None:
        """Raises GivenUpError unless this rank goes on, or leaves as it wanted."""
        model = self._model
        if model.rank not in verdict.participants:
            raise GivenUpError(
                f"rank {model.rank}: the others go on without this rank, since it did not answer "
                f"within {self._timeout_s:g} s (timeout_s)"
            )
        if verdict.error:
            if call.undo is not None:
                call.undo.apply()
            here = model._state.parcels(model._state.holders, model._optimizers.entries())
            path = write_rescue(self._policy.rescue_dir, model.rank, here, self.snapshots.all())
            raise GivenUpError(
                f"rank {model.rank}: the job can not go on: {verdict.error}. What this rank has of "
                f"the model is in {path}"
            )

    def _begin_anew(self, name: str, verdict: Verdict) -> None:
        """Lets the participants exchange messages again."""
        self.watch.settle(frozenset(verdict.participants))
        self._transport.renew(name)
        self.watch.sound()
        self._model._fetched.interrupted()
        self._open.clear()

    def _restore(self, verdict: Verdict, *, is_again: bool) -> None:
        """Brings all tensors to where the new plan wants them.

        Args:
            verdict: What is to be done.
            is_again: A training call begins anew, with the gradients there were before it.
        """
        model = self._model
        plan = Plan.from_json(verdict.plan)
        # Should this fail half-way, what is here is of no version.
        self._is_torn = self._is_torn or verdict.label is not None
        model._optimizers.steps = verdict.version.steps - self._loads
        model._optimizers.updates = verdict.updates
        self._calls = verdict.version.calls
        here = self._here()
        supply = {} if self._is_torn else {**self._kept, **model._supply(plan)}
        for snapshot in self.snapshots.all():
            if snapshot.version == verdict.version:
                copies = snapshot.parcels()
                supply.update((n, p) for n, p in copies.items() if n not in {*here, *supply})
        together = Agreement(self._transport, model.rank, verdict.participants, self._timeout_s)
        model._join(verdict.members)
        model._relocate(plan, supply, here, together)
        if not (is_again if verdict.label is not None else verdict.has_grads):
            for parameter in model._state.parameters.values():
                parameter.grad = None
        together.rows([0.0], "end of the recovery")
        self._is_torn = False
        self.watch.settle(frozenset(verdict.members))
        self.snapshots.settle(verdict.version)
        self._due = True

    def _here(self) -> list[str]:
        """Returns the tensors of this rank that are as its version says."""
        if self._is_torn:
            return []
        rank = self._model.rank
        return [n for n, ranks in self._model._state.holders.items() if rank in ranks]

    def _replay(self, verdict: Verdict) -> None:
        """Runs inference calls again that this rank has ended and others have not."""
        model, number = self._model, self._model._calls
        for logged in list(self._log):
            if verdict.base < logged.position:
                self._prepare("infer")
                model._calls = logged.number
                logged.attempt()
                self._commit("infer")
        model._calls = number

    def _tell(self, verdict: Verdict, start_s: float, text: str) -> None:
        model = self._model
        left = set(verdict.participants) - set(verdict.members)
        model._tell(
            "leave" if left else "recovery",
            start_s,
            devices=verdict.devices,
            lost_steps=verdict.lost_steps,
            lost_calls=verdict.lost_calls,
            text=text,
        )


def _reports(bodies: Mapping[int, Any]) -> dict[int, Report]:
    """Returns the reports of all ranks from JSON."""
    return {rank: Report.read(body) for rank, body in bodies.items()}
