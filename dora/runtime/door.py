"""How a device finds a job that runs, and how the job hears of it: notes in the rendezvous store.

    notice          where the job is, by its lowest member
    knock/RANK      "rank RANK wants to come in", sealed with the job's secret
    answer/NONCE    whom to connect to, or why not, sealed as well
    pulse/NONCE     the job's sign of life; here/NONCE the newcomer's

Who reads a note deletes it, since a read of what is gone blocks the store. So a notice stays, empty
once the job has ended.

The store is open to all who reach it, so what is not sealed counts for nothing: a stranger can keep
a newcomer out, but neither come in nor disturb the job. What matters then goes over the engine.
"""

from __future__ import annotations

import hmac
import json
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from torch._C._distributed_c10d import PrefixStore, Store

# A newcomer has started a process and built a module; a quarter of a second more is nothing. A look
# at the store takes 0.1 ms.
POLL_S = 0.25
# Of a newcomer that has died while it waited.
_STALE_S = 3.0

WAIT, AGAIN = "wait", "again"


class Notice(NamedTuple):
    """What a running job tells everybody.

    Attributes:
        job: Its number.
        epoch: Of its connections.
        members: Ranks that are there.
        seats: Ranks that may be there.
        machine: That all of them share; '' if they are on several.
        address: Of one of them.
        key: Its secret, if it protects nothing but one machine's loopback.
        proof: That whoever wrote it knows the secret.
    """

    job: int
    epoch: int
    members: tuple[int, ...]
    seats: int
    machine: str
    address: str
    key: str
    proof: str


class Knock(NamedTuple):
    """Who wants to come in, and where it listens.

    Attributes:
        rank: Of the newcomer.
        nonce: Tells its attempts apart.
        epoch: Of the connections that it offers.
        address, port: Where it listens.
        digest: Of its module and options.
    """

    rank: int
    nonce: str
    epoch: int
    address: str
    port: int
    digest: int


def seal(key: bytes, purpose: str, body: Any) -> str:
    """Returns `body` as text that only who knows `key` can have written, for that purpose."""
    text = json.dumps(body)
    return json.dumps([text, _mac(key, purpose, text)])


def unseal(key: bytes, purpose: str, sealed: bytes | str) -> Any:
    """Returns the body; None if the text is of somebody else."""
    try:
        text, mac = json.loads(sealed)
        is_ours = hmac.compare_digest(mac, _mac(key, purpose, text))
        return json.loads(text) if is_ours else None
    except (ValueError, TypeError):
        return None


def proof(key: bytes, job: int) -> str:
    """Returns what a notice proves itself with."""
    return _mac(key, "notice", str(job))


def _mac(key: bytes, purpose: str, text: str) -> str:
    return hmac.new(key, f"dora join {purpose}: {text}".encode(), "sha256").hexdigest()


def entrance(store: Store, number: int) -> Store:
    """Returns where the notes are of the job that runs over a process's communicator `number`."""
    return PrefixStore(f"dora/door/{number}", store)


def has_notice(store: Store) -> bool:
    """Tells whether a job that takes in devices runs there, or has run."""
    return bool(store.check(["notice"]))


def read_notice(store: Store) -> Notice | None:
    """Returns the notice at an entrance that has one; None if the job has ended."""
    fields = json.loads(store.get("notice"))
    return Notice(*fields)._replace(members=tuple(fields[2])) if fields else None


class Door:
    """The job's side: looks who knocks, on the lowest member.

    Args:
        store: The entrance.
        key: The job's secret.
        judge: Returns '' for who may come in, `WAIT`, `AGAIN` for who has to ask anew, or why not.

    Attributes:
        guest: Who comes in next.
    """

    def __init__(self, store: Store, key: bytes, judge: Callable[[Knock], str]) -> None:
        self._store = store
        self._key = key
        self._judge = judge
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        # Only the thread uses the store: a host that hangs must not hold up the job.
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[int, Knock] = {}
        self._signs: dict[str, tuple[bytes, float]] = {}  # nonce -> last sign of life, since when
        self._beats = 0
        self._admitted: Knock | None = None
        self.guest: Knock | None = None

    def open(self, notice: Notice) -> None:
        """Tells where the job is from now on, and begins to look."""
        self._tasks.put(lambda: self._store.set("notice", json.dumps(notice)))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look_out, name="dora-door", daemon=True)
            self._thread.start()

    def answer(self, knock: Knock, body: Any) -> None:
        """Tells a newcomer what becomes of it."""
        self._tasks.put(lambda: self._answer(knock, body))

    def done(self, knock: Knock) -> None:
        """Lets the next one come in."""
        self.guest, self._admitted = None, knock
        self._tasks.put(lambda: self._forget(knock))

    def close(self, *, has_ended: bool) -> None:
        """Looks no more.

        Args:
            has_ended: The job is over, rather than gone on without this rank.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread is None:
            return
        self._tasks.put(self._end if has_ended else lambda: None)
        self._thread.join(4 * POLL_S)  # it may wait for a host that hangs

    def _look_out(self) -> None:
        with suppress(RuntimeError):  # the store has died with its host: nobody comes any more
            while not (self._closing.is_set() and self._tasks.empty()):
                with suppress(queue.Empty):
                    self._tasks.get(timeout=POLL_S)()
                if not self._closing.is_set():
                    self._look()

    def _end(self) -> None:
        self._store.set("notice", "[]")
        for knock in self._waiting.values():
            self._answer(knock, {"refused": "the job has ended"})

    def _answer(self, knock: Knock, body: Any) -> None:
        self._store.set(f"answer/{knock.nonce}", seal(self._key, f"answer {knock.nonce}", body))

    def _look(self) -> None:
        if self._store.check(["knock"]):
            self._store.delete_key("knock")
            self._read_knocks()
        for knock in list(self._waiting.values()):
            self._beats += 1
            self._store.set(f"pulse/{knock.nonce}", str(self._beats))
            verdict = self._judge(knock) if self._is_here(knock) else "it is gone"
            if not verdict and self.guest is None and knock != self._admitted:
                self.guest = knock
            if verdict not in ("", WAIT):
                self._turn_away(knock, verdict)

    def _turn_away(self, knock: Knock, why: str) -> None:
        self._forget(knock)
        self._answer(knock, {AGAIN: True} if why == AGAIN else {"refused": why})

    def _forget(self, knock: Knock) -> None:
        if self._waiting.get(knock.rank) == knock:
            del self._waiting[knock.rank]
        if self.guest == knock:
            self.guest = None
        if self._signs.pop(knock.nonce, None) is not None:
            self._store.delete_key(f"here/{knock.nonce}")

    def _read_knocks(self) -> None:
        notice = read_notice(self._store)
        assert notice is not None  # by this very thread
        for rank in range(notice.seats):
            key = f"knock/{rank}"
            if not self._store.check([key]):
                continue
            body = unseal(self._key, key, self._store.get(key))
            self._store.delete_key(key)
            if body is not None:
                self._waiting[rank] = Knock(*body)

    def _is_here(self, knock: Knock) -> bool:
        sign = self._store.get(f"here/{knock.nonce}")
        last, since_s = self._signs.get(knock.nonce, (b"", 0.0))
        if sign != last:
            self._signs[knock.nonce] = sign, time.monotonic()
            return True
        return time.monotonic() - since_s < _STALE_S
