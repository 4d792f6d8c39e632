"""Engines for tests: several in one process, in processes of their own, or behind a proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ranks import _context

from dora import _C

KEY = b"k" * 32
HOST = "127.0.0.1"
ANY = -1
HANDSHAKE_BYTES = 208  # in each direction, before the first frame

Buffer = np.ndarray[Any, np.dtype[np.uint8]]


class Frame(NamedTuple):
    """One row of `Engine.log()`."""

    start_s: float
    end_s: float
    is_sent: bool
    peer: int
    type: str
    traffic_class: int
    group: int
    tag: int
    seq: int
    offset: int
    length: int


def frames(engine: _C.Engine) -> list[Frame]:
    return [Frame(*row) for row in engine.log()]


def join(engines: dict[int, _C.Engine], **options: Any) -> None:
    """Connects all with all."""
    for rank, engine in engines.items():
        peers = {r: (HOST, e.port) for r, e in engines.items() if r != rank}
        engine.connect(peers, **options)
    for engine in engines.values():
        assert engine.wait_connected(10) == [], engine.events()


@contextlib.contextmanager
def group(
    size: int, connect: dict[str, Any] | None = None, **options: Any
) -> Iterator[list[_C.Engine]]:
    """Connected engines, closed at the end."""
    engines = [_C.Engine(rank, KEY, host=HOST, **options) for rank in range(size)]
    try:
        join(dict(enumerate(engines)), **(connect or {}))
        yield engines
    finally:
        for engine in engines:
            engine.close(0)


def pattern(num_bytes: int, seed: int = 0) -> Buffer:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def send(engine: _C.Engine, data: Buffer, dst: int, **options: Any) -> _C.Operation:
    return engine.send(data.ctypes.data, data.nbytes, dst, **options)


def receive(engine: _C.Engine, data: Buffer, src: int, **options: Any) -> _C.Operation:
    return engine.receive(data.ctypes.data, data.nbytes, src, **options)


def finish(*operations: _C.Operation, timeout_s: float = 20) -> list[str]:
    """The outcomes; a hang fails the test."""
    for operation in operations:
        assert operation.wait(timeout_s), "an operation hangs"
    return [operation.outcome for operation in operations]


def move(src: _C.Engine, dst: _C.Engine, ranks: tuple[int, int], size: int, tag: int = 99) -> None:
    """Checks that one message arrives."""
    data, room = pattern(size, 7), np.zeros(size, np.uint8)
    done = receive(dst, room, ranks[0], tag=tag), send(src, data, ranks[1], tag=tag)
    assert finish(*done) == ["done", "done"], [operation.error for operation in done]
    assert np.array_equal(data, room)


def until(condition: Callable[[], Any], limit_s: float = 10) -> Any:
    """The first true value of a condition; fails after `limit_s`."""
    end_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < end_s, "did not come true in time"
        time.sleep(0.002)
    return value


def await_event(engine: _C.Engine, kind: str, rank: int) -> str:
    """The text of the first such event; operations fail a moment before it is reported."""
    return until(lambda: [text for k, r, text in engine.events() if (k, r) == (kind, rank)])[0]


class Child:
    """A process that runs `function(pipe, *args)`."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self.pipe, other = _context.Pipe()
        self.process = _context.Process(target=function, args=(other, *args), daemon=True)
        self.process.start()
        other.close()

    def take(self, limit_s: float = 30) -> Any:
        assert self.pipe.poll(limit_s), "the child says nothing"
        return self.pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class Proxy:
    """Forwards TCP connections; can be slow or silent, alter bytes and remember them.

    Args:
        port: Of the listener behind it.
        alter: (lane, offset, bytes from the caller) -> bytes to forward; lane as in HELLO.
        buffer_bytes: Of the kernel's receive buffers; None: its choice, up to megabytes.
    """

    def __init__(
        self,
        port: int,
        alter: Callable[[int, int, bytearray], bytes | bytearray] | None = None,
        buffer_bytes: int | None = None,
    ) -> None:
        self._target = port
        self._alter = alter
        self._is_open = threading.Event()
        self._is_open.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((HOST, 0))
        if buffer_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.port = self._listener.getsockname()[1]
        self.recorded: list[bytearray] = []  # from the callers, by connection
        self.rate_bytes_per_s = 0.0  # of each connection and direction; 0: no limit
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        self._is_open.clear()

    def close(self) -> None:
        self._is_open.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                called = socket.create_connection((HOST, self._target))
                self._sockets += [caller, called]
                self.recorded.append(bytearray())
                record = self.recorded[-1]
                for args in ((caller, called, record), (called, caller, None)):
                    threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, src: socket.socket, dst: socket.socket, record: bytearray | None) -> None:
        offset = 0
        with contextlib.suppress(OSError):
            while data := src.recv(65536):
                self._is_open.wait()
                if self.rate_bytes_per_s > 0:
                    time.sleep(len(data) / self.rate_bytes_per_s)
                if record is not None:
                    record += data
                    if self._alter:
                        data = self._alter(record[4], offset, bytearray(data))
                offset += len(data)
                dst.sendall(data)
        with contextlib.suppress(OSError):
            dst.shutdown(socket.SHUT_WR)


def flip(lane: int, at: int) -> Callable[[int, int, bytearray], bytearray]:
    """Alters one bit of the stream of a lane."""

    def alter(given: int, offset: int, data: bytearray) -> bytearray:
        if given == lane and offset <= at < offset + len(data):
            data[at - offset] ^= 0x10
        return data

    return alter


@contextlib.contextmanager
def proxied(
    alter: Callable[[int, int, bytearray], bytes | bytearray] | None = None,
    buffer_bytes: int | None = None,
    **options: Any,
) -> Iterator[tuple[_C.Engine, _C.Engine, Proxy]]:
    """Engines 0 and 1; what they say to each other goes through a proxy."""
    a, b = (_C.Engine(rank, KEY, host=HOST, **options) for rank in range(2))
    proxy = Proxy(b.port, alter, buffer_bytes)
    try:
        b.connect({0: (HOST, a.port)})  # first, so that it expects the call
        a.connect({1: (HOST, proxy.port)})
        assert a.wait_connected(10) == b.wait_connected(10) == []
        yield a, b, proxy
    finally:
        a.close(0)
        b.close(0)
        proxy.close()
