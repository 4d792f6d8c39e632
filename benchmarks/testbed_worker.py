"""What runs on the devices of a testbed while `bench_testbed` looks on; it starts quickly.

`receive PORT` and `send HOST PORT SECONDS` carry as much as fits; `echo PORT` and `ping HOST PORT
COUNT` exchange small messages; `spin SECONDS` computes. What was measured goes out as JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time

_SMALL_BYTES = 64
_CHUNK_BYTES = 1 << 16
_SAMPLE_S = 0.02
_CONNECT_S = 10.0


def receive(port: str) -> object:
    """Returns (seconds on the machine's clock, bytes so far), at most every 20 ms."""
    connection = _accept(port)
    buffer = bytearray(_CHUNK_BYTES)
    total, samples = 0, [(0.0, 0)]
    while count := connection.recv_into(buffer):
        total, now_s = total + count, time.monotonic()
        if now_s - samples[-1][0] >= _SAMPLE_S:
            samples.append((now_s, total))
    return [*samples[1:], (now_s, total)]


def send(host: str, port: str, duration_s: str) -> object:
    """Sends for a time."""
    connection, data = _connect(host, port), bytes(_CHUNK_BYTES)
    end_s = time.monotonic() + float(duration_s)
    while time.monotonic() < end_s:
        connection.sendall(data)
    return None


def echo(port: str) -> object:
    """Answers messages until there are no more."""
    connection = _accept(port)
    while data := connection.recv(_SMALL_BYTES):
        connection.sendall(data)
    return None


def ping(host: str, port: str, count: str) -> object:
    """Returns the seconds of every round trip."""
    connection, found = _connect(host, port), []
    for _ in range(int(count)):
        start_s = time.perf_counter()
        connection.sendall(bytes(_SMALL_BYTES))
        connection.recv(_SMALL_BYTES, socket.MSG_WAITALL)
        found.append(time.perf_counter() - start_s)
    return found


def spin(duration_s: str) -> object:
    """Returns the share of a core that a loop got, as the process itself counts it."""
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    while time.monotonic() < start_s + float(duration_s):
        pass
    return (time.process_time() - start_cpu_s) / (time.monotonic() - start_s)


def _accept(port: str) -> socket.socket:
    with socket.create_server(("", int(port))) as server:
        return _tuned(server.accept()[0])


def _connect(host: str, port: str) -> socket.socket:
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            return _tuned(socket.create_connection((host, int(port)), timeout=None))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _tuned(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
