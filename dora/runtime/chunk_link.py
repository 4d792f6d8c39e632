"""One peer of `ChunkedTransport`: sends in order of priority over a library that has none.

One protocol serves gloo and NCCL, because NCCL has no tags. Per peer there are a gloo connection
for notes of six int64 and, per direction, a FIFO of chunks. The receiver posts memory and grants
it; the sender takes the next chunk from its `SendQueue`, starts it and announces where it belongs;
the receiver reads it straight into the posted memory and acknowledges it. At most two chunks are
under way, so no more stands before an urgent message.

gloo completes nothing unless a thread waits, and one wait that times out closes every connection
of its group. So each peer has three threads that wait without a limit, time limits are kept by
whoever waits for an operation, and `close` uses a wait of 1 ms to wake everybody.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch

from dora._C import SendQueue
from dora.errors import ProtocolError
from dora.runtime.priority import Priority
from dora.runtime.transport import lost

_CHUNK, _ACK, _GRANT, _REFUSE, _BYE = range(5)
_NOTE_FIELDS = 6  # kind, tag, seq, then what the kind needs, then zeros
_NOTES_AHEAD = 8  # posted receives of notes, and sends of notes that nobody has waited for
FOREVER = timedelta(days=3650)
LINGER_S = 1.0  # for the last notes when closing

_Note = tuple[int, ...]
_Key = tuple[int, int]  # tag and seq; equal for a send and its receive
_Begin = Callable[[torch.Tensor, Any], Callable[[], object]]
_Form = tuple[int, int]  # number of bytes, is it in GPU memory; equal too, or both fail


class ChunkedPending:
    """A transfer under way; keeps its tensor alive."""

    def __init__(self, tensor: torch.Tensor, rank: int, peer: int, action: str) -> None:
        self.finished_s: float | None = None  # time.perf_counter(), of both ends and failures
        self._tensor = tensor
        self._rank, self._peer, self._action = rank, peer, action
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._error: RuntimeError | None = None

    def finish(self, error: RuntimeError | None = None) -> None:
        """Ends the transfer; only the first call counts."""
        with self._lock:
            if not self._finished.is_set():
                self._error = error
                self.finished_s = time.perf_counter()
                self._finished.set()

    def is_completed(self) -> bool:
        """Tells whether it is over, well or not."""
        return self._finished.is_set()

    def wait(self, timeout_s: float) -> None:
        """Blocks until done; raises PeerLostError that names rank, peer and action.

        Raises ProtocolError instead if both ends disagree about the message.
        """
        error = self._error if self._finished.wait(timeout_s) else RuntimeError("timed out")
        if isinstance(error, ProtocolError):
            where = f"rank {self._rank}: {self._action} with rank {self._peer}"
            raise ProtocolError(f"{where} failed: {error}")
        if error is not None:
            raise lost(self._rank, f"rank {self._peer}", self._action, error, timeout_s)


@dataclass
class Message:
    """A tensor to send, or memory for one."""

    tag: int
    data: torch.Tensor  # all bytes, one dimension
    ready: Any  # a CUDA event: earlier work on the memory is over
    pending: ChunkedPending
    seq: int = 0  # how many with this tag were posted before it

    @property
    def key(self) -> _Key:
        """What a send and its receive have in common."""
        return self.tag, self.seq

    @property
    def form(self) -> _Form:
        """What both must agree on."""
        return self.data.numel(), int(self.data.is_cuda)


@dataclass
class _Chunk:
    message: Message
    num_bytes: int
    is_last: bool
    finish: Callable[[], object]  # blocks until the memory is free or filled


class Wire(Protocol):
    """A FIFO of chunks in each direction; both calls return what blocks until the end."""

    def send(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        """Starts sending once the CUDA event `ready` has happened."""

    def receive(self, data: torch.Tensor, ready: Any) -> Callable[[], object]:
        """Starts receiving once the CUDA event `ready` has happened."""

    def abort(self) -> None:
        """Ends what waits for a lost peer."""


class Link:
    """What goes on between this rank and one peer: a queue, three threads, one lock."""

    def __init__(
        self, peer: int, notes: Any, wires: dict[str, Wire], chunk_bytes: int, aging_s: float
    ) -> None:
        self._peer = peer
        self._notes = notes
        self._wires = wires
        self._chunk_bytes = chunk_bytes
        # One byte more than a chunk: the second leaves beside the first, the third must wait.
        self._queue = SendQueue(aging_s, chunk_bytes + 1)
        self._changed = threading.Condition()  # guards all that follows
        self._error: RuntimeError | None = None
        self._numbers = itertools.count()
        self._sent: Counter[int] = Counter()  # by tag
        self._received: Counter[int] = Counter()
        self._sends: dict[int, Message] = {}  # by number in the queue
        self._ungranted: dict[_Key, int] = {}
        self._grants: dict[_Key, _Form] = {}  # for sends that are not posted yet
        self._receives: dict[_Key, Message] = {}
        self._leaving: deque[_Chunk] = deque()  # announced, not acknowledged
        self._outbox: deque[_Note] = deque()
        self._has_said_bye = False
        self._parted = threading.Event()  # nothing more comes from the peer
        self._arriving: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._told: deque[Any] = deque()  # sends of notes; the thread that sends uses it alone
        self._threads = [
            threading.Thread(target=self._run, args=(pump,), name=f"dora-{peer}", daemon=True)
            for pump in (self._pump_out, self._pump_notes, self._pump_in)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message, priority: Priority) -> None:
        """Queues a message; it may leave once the peer has granted it."""
        with self._changed:
            message.seq = self._sent[message.tag]
            self._sent[message.tag] += 1
            if self._error is not None:
                return message.pending.finish(self._error)
            number = next(self._numbers)
            traffic_class, deadline, unit_bytes = priority
            self._queue.post(
                number,
                message.data.numel(),
                traffic_class,
                deadline,
                time.monotonic(),
                is_ready=False,
                unit_bytes=unit_bytes,
            )
            self._sends[number] = message
            self._ungranted[message.key] = number
            if message.key in self._grants:
                self._grant(message.key, self._grants.pop(message.key))

    def receive(self, message: Message) -> None:
        """Posts memory for a message and tells the peer."""
        with self._changed:
            message.seq = self._received[message.tag]
            self._received[message.tag] += 1
            if self._error is not None:
                return message.pending.finish(self._error)
            self._receives[message.key] = message
            self._tell(_GRANT, *message.key, *message.form)

    def fail(self, error: RuntimeError) -> None:
        """Ends all operations; the notes in the outbox still leave."""
        with self._changed:
            self._error = self._error or error
            messages = [*self._sends.values(), *self._receives.values()]
            messages += [chunk.message for chunk in self._leaving]
            for unfinished in (self._sends, self._ungranted, self._receives):
                unfinished.clear()
            self._changed.notify_all()
        self._arriving.put(None)
        for wire in self._wires.values():
            wire.abort()
        for message in messages:
            message.pending.finish(self._error)

    def leave(self) -> None:
        """Says goodbye, and ends all operations here."""
        self._say_bye()
        self.fail(RuntimeError("this rank has ended the transport"))

    def wait_parted(self, deadline_s: float) -> None:
        """Blocks until the peer has read all notes, is lost, or time.monotonic() says so."""
        self._parted.wait(max(0.0, deadline_s - time.monotonic()))

    def join(self) -> None:
        """Waits for the threads to end, once the connections are closed."""
        for thread in self._threads:
            thread.join(2 * LINGER_S)

    def _run(self, pump: Callable[[], None]) -> None:
        try:
            pump()
        except RuntimeError as error:
            self.fail(error)
        except LookupError as error:
            self.fail(ProtocolError(f"it sent a note that fits nothing here: {error!r}"))

    def _tell(self, *note: int) -> None:
        with self._changed:
            self._outbox.append(note)
            self._changed.notify_all()

    def _say_bye(self) -> None:
        with self._changed:
            if not self._has_said_bye:
                self._tell(_BYE)
            self._has_said_bye = True

    def _grant(self, key: _Key, form: _Form) -> None:
        """Lets a posted send leave, if it is what the receiver expects."""
        number = self._ungranted.pop(key)
        message = self._sends[number]
        if form == message.form:
            self._queue.set_ready(number)
            self._changed.notify_all()
            return
        self._queue.cancel(number)
        del self._sends[number]
        message.pending.finish(_mismatch(message.form, form))
        self._tell(_REFUSE, *key, *message.form)

    # The first thread sends: notes first, then chunks in the order of the queue.

    def _pump_out(self) -> None:
        while (job := self._next_job()) is not None:
            job()
        for work in self._told:
            work.wait(FOREVER)

    def _next_job(self) -> Callable[[], None] | None:
        """Blocks until there is something to send; None: never again."""
        with self._changed:
            while True:
                if self._outbox:
                    return partial(self._send_note, self._outbox.popleft())
                if self._error is not None:
                    return None
                chunk = self._queue.next(time.monotonic(), self._chunk_bytes)
                if chunk is not None:
                    return partial(self._send_chunk, *chunk)
                self._changed.wait()

    def _send_note(self, note: _Note) -> None:
        fields = torch.tensor(note + (0,) * (_NOTE_FIELDS - len(note)))
        self._told.append(self._notes.send([fields], self._peer, 0))
        if len(self._told) > _NOTES_AHEAD:
            self._told.popleft().wait(FOREVER)

    def _send_chunk(self, number: int, offset: int, num_bytes: int, is_last: bool) -> None:
        with self._changed:
            message = self._sends.get(number)
        if message is None:
            return  # failed meanwhile
        finish = self._move(self._wire(message).send, message, offset, num_bytes)
        with self._changed:
            # Before the announcement, because that is what the acknowledgement may follow.
            self._leaving.append(_Chunk(message, num_bytes, is_last, finish))
            if is_last:
                self._sends.pop(number, None)
        self._send_note((_CHUNK, *message.key, offset, num_bytes, message.data.numel()))

    def _wire(self, message: Message) -> Wire:
        return self._wires[message.data.device.type]

    def _move(
        self, begin: _Begin, message: Message, offset: int, num_bytes: int
    ) -> Callable[[], object]:
        if num_bytes == 0:
            return lambda: None  # an empty message is a note only
        return begin(message.data[offset : offset + num_bytes], message.ready)

    # The second thread reads notes.

    def _pump_notes(self) -> None:
        handlers: dict[int, Callable[..., None]] = {
            _CHUNK: self._on_chunk,
            _ACK: self._on_ack,
            _GRANT: self._on_grant,
            _REFUSE: self._on_refuse,
            _BYE: self._on_bye,
        }
        try:
            for kind, *values in self._read_notes():
                if self._error is None or kind == _BYE:
                    handlers[kind](*values)
                if kind == _BYE:
                    return
        finally:
            self._parted.set()

    def _read_notes(self) -> Iterator[list[int]]:
        """Yields notes until the connection is closed, also those that came just before."""
        posted = deque(self._post_note() for _ in range(_NOTES_AHEAD))
        while posted:
            work, fields = posted.popleft()
            work.wait(FOREVER)
            with suppress(RuntimeError):  # closed: the rest is read first
                posted.append(self._post_note())
            yield fields.tolist()
        raise RuntimeError("closed by the peer")

    def _post_note(self) -> tuple[Any, torch.Tensor]:
        fields = torch.zeros(_NOTE_FIELDS, dtype=torch.int64)
        return self._notes.recv([fields], self._peer, 0), fields

    def _on_bye(self, *_: int) -> None:
        self._say_bye()
        self.fail(RuntimeError("closed by the peer"))

    def _on_grant(self, tag: int, seq: int, num_bytes: int, is_cuda: int, _: int) -> None:
        with self._changed:
            if (tag, seq) in self._ungranted:
                self._grant((tag, seq), (num_bytes, is_cuda))
            else:
                self._grants[tag, seq] = num_bytes, is_cuda

    def _on_refuse(self, tag: int, seq: int, num_bytes: int, is_cuda: int, _: int) -> None:
        with self._changed:
            message = self._receives.pop((tag, seq), None)
        if message is not None:  # else this link has failed meanwhile
            message.pending.finish(_mismatch((num_bytes, is_cuda), message.form))

    def _on_chunk(self, tag: int, seq: int, offset: int, num_bytes: int, total: int) -> None:
        with self._changed:
            message = self._receives.get((tag, seq))
        if message is None or not 0 <= offset <= offset + num_bytes <= total == message.form[0]:
            raise ProtocolError(f"it sent bytes nobody asked for: tag {tag}, message {seq}")
        finish = self._move(self._wire(message).receive, message, offset, num_bytes)
        self._arriving.put(_Chunk(message, num_bytes, offset + num_bytes == total, finish))

    def _on_ack(self, *_: int) -> None:
        chunk = self._leaving.popleft()
        chunk.finish()  # at once: the bytes are there
        with self._changed:
            self._queue.acknowledge(chunk.num_bytes)
            self._changed.notify_all()
        if chunk.is_last:
            chunk.message.pending.finish()

    # The third thread waits for chunks.

    def _pump_in(self) -> None:
        while (chunk := self._arriving.get()) is not None:
            chunk.finish()
            if self._error is not None:
                return  # an aborted transfer looks finished
            self._tell(_ACK)  # first: whoever sees the message may call `close`
            if chunk.is_last:
                with self._changed:
                    self._receives.pop(chunk.message.key, None)
                chunk.message.pending.finish()


def _mismatch(sent: _Form, expected: _Form) -> ProtocolError:
    """Returns what both ends of a message say when they do not fit."""
    texts = [
        f"{num_bytes} bytes on a {('CPU', 'GPU')[is_cuda]}"
        for num_bytes, is_cuda in (sent, expected)
    ]
    return ProtocolError(f"{texts[0]} were sent and {texts[1]} expected; post equal tensors")
