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
from typing import Any

import psutil
import torch

from dora.errors import DoraError, PeerLostError
from dora.runtime.admission import Admission, job_digest, take_in
from dora.runtime.agreement import Agreement
from dora.runtime.copies import USERS, Copies
from dora.runtime.engine_transport import EngineTransport
from dora.runtime.membership import FAILURE, GivenUpError, Watch
from dora.runtime.ongoing import Logged, Ongoing
from dora.runtime.parcel import Parcel
from dora.runtime.replan import Policy, choose_plan
from dora.runtime.rescue import write_rescue
from dora.runtime.snapshot import Version
from dora.runtime.undo import Undo
from dora.runtime.verdict import Report, Store, Verdict, decide
from dora.spec import Plan

# Inference calls that may be under way before all have ended the first of them. As many fill a
# pipeline of as many stages; what is kept of each are its inputs.
_MAX_OPEN = 8

# Failures of a device, which the others survive; any other one is the program's.
_OWN_FAILURES = (MemoryError, torch.OutOfMemoryError)


class Recovery:
    """Keeps the calls of one model going.

    Args:
        model: A DoraParallel.
        transport: Its transport.
        policy: The user's wishes.

    Attributes:
        plans: Members -> the plan that these have run last.
        is_knocked: Somebody wants to join, as all members have heard.
        is_guest: This rank has not quite joined yet; no failure is survived.
    """

    def __init__(self, model: Any, transport: EngineTransport, policy: Policy) -> None:
        self.model = model
        self.transport = transport
        self.policy = policy
        self._timeout_s: float = model.timeout_s
        self.watch = Watch(
            transport.communicator, transport.number("notes"), transport.interrupt, model.members
        )
        self.copies = Copies(model, transport, policy.snapshot_interval)
        self._calls = 0  # training calls
        self._loads = 0
        self._open: deque[Callable[[], list[list[float]]]] = deque()
        self._log: deque[Logged] = deque(maxlen=_MAX_OPEN + 1)
        self._kept: dict[str, Parcel] = {}
        self._is_torn = False
        self._trained_at = -1  # updates before the last training call
        self.plans = {model.members: model.plan}
        self.is_knocked = self.is_guest = False
        self.digest = job_digest(model, policy.snapshot_interval)
        self.admission = Admission(self)

    @property
    def version(self) -> Version:
        """Of this rank's state, between calls."""
        return Version(self.model._optimizers.steps + self._loads, self._calls)

    # ------------------------------------------------------------ calls

    def run(self, kind: str, attempt: Callable[[], Any]) -> Any:
        """Runs a collective call until it has ended on all ranks that are left."""
        model = self.model
        call = Ongoing(kind, model._calls, attempt)
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
                if self.is_guest:
                    raise
                failure = error
            except BaseException as error:
                self._fail(error)

    def _try(self, call: Ongoing) -> None:
        call.results, call.undo = [], None
        self.model._calls = call.number
        self._prepare(call.kind)
        call.undo = Undo(self.model._state) if call.kind == "train" else None
        call.results = [call.attempt()]
        self._commit(call.kind)
        self._end(call)

    def take_in(self, kind: str) -> bool:
        """Takes in who knocks, before a call of the user that a newcomer can begin with."""
        updates = self.model._optimizers.updates
        is_start = (
            self._calls == 0 if kind != "train" else updates != self._trained_at or not updates
        )
        return self.is_knocked and is_start and take_in(self, kind)

    def loaded(self) -> None:
        """Notes that the parameters are others now."""
        self._loads += 1
        self.copies.is_due = True

    def keep(self, supply: Mapping[str, Parcel]) -> None:
        """Keeps what this rank is about to give away until all have what they need."""
        self._kept.update(supply)

    def leave(self) -> None:
        """Goes, once the others have what this rank holds."""
        self.admission.door.close(has_ended=False)
        failure = PeerLostError(f"rank {self.model.rank}: this device leaves")
        call = Ongoing("leave", self.model._calls, lambda: None)
        while True:
            try:
                return self._recover(failure, call)
            except GivenUpError as error:
                self.model._fail(error)
            except PeerLostError as error:
                failure = error

    def close(self, *, has_ended: bool) -> None:
        """Ends what runs in the background.

        Args:
            has_ended: The job is over, rather than gone on without this rank.
        """
        self.admission.door.close(has_ended=has_ended)
        self.watch.close()
        self.transport.interrupt("this rank closed its connections")
        self.copies.snapshots.stop()

    def snapshot(self) -> None:
        """Takes a snapshot now and waits until all ranks have it; a collective call."""
        self.copies.is_due = True
        while self.copies.is_due or self.copies.snapshots.taking is not None:
            self.run("snapshot", lambda: time.sleep(0.001))
        last = self.copies.snapshots.complete
        if last is None or last.version != self.version:
            raise DoraError(f"snapshot: not complete within {self._timeout_s:g} s (timeout_s)")

    def _prepare(self, kind: str) -> None:
        reason = self.watch.alarm()
        if reason is not None:
            raise PeerLostError(f"rank {self.model.rank}: {kind} failed: {reason}")
        while len(self._open) >= (_MAX_OPEN if kind == "infer" else 1):
            self._learn(self._open.popleft()())
        self.copies.prepare(kind, self.version)

    def _commit(self, kind: str) -> None:
        """Waits until all have ended the call, or lets inference calls be open for a while."""
        row = [self.copies.done(), float(self.admission.is_knocked())]
        rows = self.model._agreement.start_rows(row, f"end of {kind}")
        if kind == "infer":
            self._open.append(rows)
        else:
            self._learn(rows())

    def _learn(self, rows: list[list[float]]) -> None:
        self.copies.learn(int(min(row[0] for row in rows)))
        self.is_knocked = any(row[1] for row in rows)

    def _end(self, call: Ongoing) -> None:
        call.is_over = True
        self.watch.position += 1
        if call.kind in USERS:
            self.plans[self.model.members] = self.model.plan
        if call.kind == "train":
            self._calls += 1
            self._trained_at = self.model._optimizers.updates
        if call.kind == "infer":
            self._log.append(Logged(self.watch.position, call.number, call.attempt))
        else:
            self._kept.clear()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, _OWN_FAILURES):
            rank = self.model.rank
            text = f"first failure, on rank {rank}: {type(error).__name__}: {error}"
            self.watch.tell_all(FAILURE, 0, text)
        self.model._fail(error)

    # ------------------------------------------------------------ joining

    def state(self) -> dict[str, Any]:
        """Returns where this rank is, for one that joins."""
        plans = [(members, plan.to_json()) for members, plan in self.plans.items()]
        return {
            "version": self.version,
            "updates": self.model._optimizers.updates,
            "trained_at": self._trained_at,
            "serial": self.copies.serial,
            "round": self.watch.round,
            "position": self.watch.position,
            "plans": plans,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on where another rank is."""
        version = Version(*state["version"])
        self._calls, self._trained_at = version.calls, state["trained_at"]
        self.copies.serial = state["serial"]
        self.model._optimizers.steps, self.model._optimizers.updates = version[0], state["updates"]
        self.watch.round, self.watch.position = state["round"], state["position"]
        self.plans = {tuple(there): Plan.from_json(plan) for there, plan in state["plans"]}

    def come_together(self) -> None:
        """Forgets what was only for the members before."""
        self._log.clear()
        self._kept.clear()
        self.copies.is_due = True
        self.admission.open()

    # ------------------------------------------------------------ after a loss

    def _recover(self, failure: PeerLostError, call: Ongoing) -> None:
        """Goes on with those who are left; ends the interrupted call if it counts as done."""
        start_s = time.perf_counter()
        self.transport.interrupt(str(failure))
        self.copies.snapshots.stop()
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
            self.model._calls = call.number
            if call.undo is not None:
                call.undo.apply()
                call.undo = None
        self._begin_anew(f"{number}.{fields[0]}", verdict)
        self.copies.serial = number << 20  # some have begun a snapshot that others have not
        self._restore(verdict, is_again=call.kind == "train" and not call.is_over)
        self._tell(verdict, start_s, str(failure))
        if call.kind != "leave":
            self._replay(verdict)

    def _report(self, call: Ongoing) -> Report:
        model = self.model
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
                Store(s.version, s.updates, tuple(s.parcels())) for s in self.copies.snapshots.all()
            ),
            limit_bytes=model._memory_limit_bytes or psutil.virtual_memory().total,
            has_grads=before.has_grads(),
        )

    def _decide(self, reports: Mapping[int, Report]) -> Any:
        model, watch = self.model, self.watch
        verdict = decide(
            reports, list(model._state.holders), model.plan.devices, self._replan, watch.silent()
        )
        if not verdict.error:
            claimed = model._board.claim(f"after round {watch.round}", verdict.members)
            if model.rank in verdict.members and model.rank not in claimed:
                verdict = Verdict(tuple(reports), error=f"ranks {claimed} go on without this one")
        return model.rank, verdict

    def _replan(self, gone: tuple[str, ...], reports: Mapping[int, Report]) -> str:
        model = self.model
        limits = {model.plan.devices[r]: report.limit_bytes for r, report in reports.items()}
        return choose_plan(model.plan, model.chain, gone, limits, self.policy).to_json()

    def _check(self, verdict: Verdict, call: Ongoing) -> None:
        """Raises GivenUpError unless this rank goes on, or leaves as it wanted."""
        model = self.model
        if model.rank not in verdict.participants:
            raise GivenUpError(
                f"rank {model.rank}: the others go on without this rank, since it did not answer "
                f"within {self._timeout_s:g} s (timeout_s)"
            )
        if verdict.error:
            if call.undo is not None:
                call.undo.apply()
            here = model._state.parcels(model._state.holders, model._optimizers.entries())
            path = write_rescue(
                self.policy.rescue_dir, model.rank, here, self.copies.snapshots.all()
            )
            raise GivenUpError(
                f"rank {model.rank}: the job can not go on: {verdict.error}. What this rank has of "
                f"the model is in {path}"
            )

    def _begin_anew(self, name: str, verdict: Verdict) -> None:
        """Lets the participants exchange messages again."""
        self.watch.settle(frozenset(verdict.participants))
        self.transport.renew(name)
        self.watch.sound()
        self.model._fetched.interrupted()
        self._open.clear()

    def _restore(self, verdict: Verdict, *, is_again: bool) -> None:
        """Brings all tensors to where the new plan wants them.

        Args:
            verdict: What is to be done.
            is_again: A training call begins anew, with the gradients there were before it.
        """
        model = self.model
        plan = Plan.from_json(verdict.plan)
        # Should this fail half-way, what is here is of no version.
        self._is_torn = self._is_torn or verdict.label is not None
        model._optimizers.steps = verdict.version.steps - self._loads
        model._optimizers.updates = verdict.updates
        self._calls = verdict.version.calls
        here = self._here()
        supply = {} if self._is_torn else {**self._kept, **model._supply(plan)}
        for snapshot in self.copies.snapshots.all():
            if snapshot.version == verdict.version:
                copies = snapshot.parcels()
                supply.update((n, p) for n, p in copies.items() if n not in {*here, *supply})
        together = Agreement(self.transport, model.rank, verdict.participants, self._timeout_s)
        model._join(verdict.members)
        model._relocate(plan, supply, here, together)
        if not (is_again if verdict.label is not None else verdict.has_grads):
            for parameter in model._state.parameters.values():
                parameter.grad = None
        together.rows([0.0], "end of the recovery")
        self._is_torn = False
        self.watch.settle(frozenset(verdict.members))
        self.copies.snapshots.settle(verdict.version)
        self.copies.is_due = True
        self.admission.open()

    def _here(self) -> list[str]:
        """Returns the tensors of this rank that are as its version says."""
        if self._is_torn:
            return []
        rank = self.model.rank
        return [n for n, ranks in self.model._state.holders.items() if rank in ranks]

    def _replay(self, verdict: Verdict) -> None:
        """Runs inference calls again that this rank has ended and others have not."""
        model, number = self.model, self.model._calls
        for logged in list(self._log):
            if verdict.base < logged.position:
                self._prepare("infer")
                model._calls = logged.number
                logged.attempt()
                self._commit("infer")
        model._calls = number

    def _tell(self, verdict: Verdict, start_s: float, text: str) -> None:
        model = self.model
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
