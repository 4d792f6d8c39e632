"""Looks at the way to one peer, step by step: which step fails, and what to do about it.

It speaks the engine's own handshake, as a probe: against the port of a running job, or against
`dora doctor --listen` on the other device.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from dora import _C
from dora.doctor import Finding
from dora.errors import SpecError

DEFAULT_PORT = 29610
# The next of the ranks that no job has.
_LISTENER_RANK = _C.PROBE_RANK - 1
# Clocks further apart make logs and traces of two devices hard to compare.
_MAX_CLOCK_OFFSET_S = 1.0


class Address(NamedTuple):
    """Numeric, of a host that was given by name."""

    family: socket.AddressFamily
    host: str
    port: int


class _BrokenError(Exception):
    """Ends the steps with a finding."""

    def __init__(self, subject: str, text: str, fix: str) -> None:
        super().__init__(text)
        self.finding = Finding(subject, "broken", text, fix)


def parse_peer(text: str) -> tuple[str, int]:
    """Splits `HOST[:PORT]`; an IPv6 address with a port goes in brackets."""
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("[") and "]" in text:
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise SpecError(f"--peer: given {text!r}, allowed: HOST or HOST:PORT, port 1 to 65535")
    return host, int(port)


def check_peer(host: str, port: int, key: bytes, *, timeout_s: float = 5.0) -> Iterator[Finding]:
    """Yields what each step found, and ends after the first that is broken.

    Args:
        host: Name or address of the peer.
        port: That its engine, or `dora doctor --listen`, listens on.
        key: Shared secret, 16 bytes or more.
        timeout_s: Limit of connecting and of each answer.
    """
    try:
        addresses = _resolve(host, port)
        yield Finding("name", "ok", f"{host} is {' or '.join(a.host for a in addresses)}")
        address, finding = _route(addresses)
        yield finding
        start_s = time.perf_counter()
        with _connect(address, timeout_s) as connection:
            taken_ms = (time.perf_counter() - start_s) * 1e3
            yield Finding("port", "ok", f"{port} is open; connected in {taken_ms:.3g} ms")
            yield from _authenticate(connection, key, timeout_s)
    except _BrokenError as error:
        yield error.finding


def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) else "not a host name"
        fix = "check the spelling, or give its address; on that device: hostname -I"
        raise _BrokenError("name", f"{host}: {text}", fix) from None
    # An engine listens on IPv4 unless told otherwise.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(Address(entry[0], str(entry[4][0]), port) for entry in found))


def _route(addresses: list[Address]) -> tuple[Address, Finding]:
    """Returns the first address that this machine can send to; asking sends no packet."""
    reason: str | None = None
    for address in addresses:
        with socket.socket(address.family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address.host, address.port))
            except OSError as error:
                reason = error.strerror
                continue
            own = probe.getsockname()[0]
        if own == address.host or own.startswith("127."):
            return address, Finding("route", "ok", f"{address.host} is this machine itself")
        return address, Finding("route", "ok", f"from {own}{_interface(own)} to {address.host}")
    hosts = " or ".join(address.host for address in addresses)
    fix = "connect both devices to one network; look at: ip route"
    raise _BrokenError("route", f"no way to {hosts}: {reason}", fix)


def _interface(own: str) -> str:
    for name, entries in psutil.net_if_addrs().items():
        if own in (entry.address for entry in entries):
            return f" ({name})"
    return ""


def _connect(address: Address, timeout_s: float) -> socket.socket:
    place = f"{address.host} port {address.port}"
    try:
        return socket.create_connection((address.host, address.port), timeout=timeout_s)
    except ConnectionRefusedError:
        text = f"{place}: refused; the device is there, but nothing listens on that port"
        fix = f"start it there: dora doctor --listen {address.port}, or the job; or correct PORT"
    except TimeoutError:
        text = f"{place}: no answer within {timeout_s:g} s"
        fix = (
            f"is it on and awake? does a firewall there drop it (sudo ufw allow {address.port}/tcp)"
            ", or the Wi-Fi keep its clients apart (guest network, client isolation)?"
        )
    except OSError as error:
        text = f"{place}: unreachable: {error.strerror}"
        fix = f"is it on, with that address, and in the same network? try: ping {address.host}"
    raise _BrokenError("port", text, fix) from None


def _authenticate(connection: socket.socket, key: bytes, timeout_s: float) -> Iterator[Finding]:
    handshake = _C.Handshake.initiate(key, rank=_C.PROBE_RANK, peer_rank=_C.PROBE_RANK)
    fix = "is that port Dora's? are both versions of Dora the same (pip show dora-parallel)?"
    asked_s = time.time()
    problem = _exchange(connection, handshake, timeout_s)
    answered_s = time.time()
    if problem is not None and problem[0] != "key":
        raise _BrokenError("version", problem[1], fix)
    yield Finding("version", "ok", "it is Dora, with the same protocol")
    problem = problem or _exchange(connection, handshake, timeout_s)
    if problem is not None:
        fix = "give both devices the same key: dora key --out FILE, copied to the other"
        raise _BrokenError("key", problem[1], fix)
    what = "dora doctor --listen"
    if handshake.peer_rank != _LISTENER_RANK:
        what = f"rank {handshake.peer_rank} of a job"
    yield Finding("key", "ok", f"the same; {what} answered")
    yield _clock(handshake.peer_clock_s - (asked_s + answered_s) / 2, answered_s - asked_s)


def _clock(offset_s: float, round_trip_s: float) -> Finding:
    """Judges the peer's wall clock; the answer was written somewhere in the round trip."""
    side = "ahead of" if offset_s > 0 else "behind"
    text = f"{abs(offset_s):.3g} s {side} ours, give or take {round_trip_s / 2:.2g} s"
    if abs(offset_s) - round_trip_s / 2 <= _MAX_CLOCK_OFFSET_S:
        return Finding("clock", "ok", text)
    fix = "set both clocks, so that logs and traces fit together: sudo timedatectl set-ntp true"
    return Finding("clock", "missing", text, fix)


def _exchange(
    connection: socket.socket, handshake: _C.Handshake, timeout_s: float
) -> tuple[str, str] | None:
    """Sends what the handshake has to say and hands it one answer; returns (reason, text)."""
    try:
        connection.sendall(handshake.output())
        handshake.input(_receive(connection, handshake.needed, timeout_s))
    except _C.HandshakeError as error:
        _send_verdict(connection, handshake)
        return error.args[-1], error.args[0]
    except OSError as error:
        return "connection", error.strerror or str(error)
    return None


def _receive(connection: socket.socket, num_bytes: int, timeout_s: float) -> bytes:
    """Returns exactly so many bytes; OSError if they do not come in time."""
    received, deadline_s = b"", time.monotonic() + timeout_s
    while len(received) < num_bytes:
        # Zero would mean not to wait, and negative numbers are refused.
        connection.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        try:
            piece = connection.recv(num_bytes - len(received))
        except TimeoutError:
            raise TimeoutError(
                f"connected, but only {len(received)} of {num_bytes} bytes within {timeout_s:g} s"
            ) from None
        if not piece:
            raise ConnectionError(
                f"closed the connection after {len(received)} of {num_bytes} bytes"
            )
        received += piece
    return received


def _send_verdict(connection: socket.socket, handshake: _C.Handshake) -> None:
    """Tells the other side why, if it still listens."""
    with contextlib.suppress(OSError):
        connection.sendall(handshake.output())


def listen(port: int, host: str = "0.0.0.0") -> socket.socket:
    """Opens a port for probes; 0 takes a free one."""
    try:
        return socket.create_server((host, port), backlog=16)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no port"
        raise SpecError(
            f"--listen: given {port} ({reason}), allowed: a free port, or 0 for any"
        ) from None


def own_addresses() -> list[str]:
    """Returns the IPv4 addresses under which other devices may reach this one."""
    entries = [entry for found in psutil.net_if_addrs().values() for entry in found]
    v4 = [entry.address for entry in entries if entry.family == socket.AF_INET]
    return [address for address in v4 if not address.startswith("127.")]


def answer_probe(listener: socket.socket, key: bytes, *, timeout_s: float = 5.0) -> Finding:
    """Waits for one caller, answers it as an engine would, and returns how that went."""
    connection, (caller, *_) = listener.accept()
    handshake = _C.Handshake.respond(key, rank=_LISTENER_RANK)
    with connection:
        while not handshake.is_done:
            problem = _exchange(connection, handshake, timeout_s)
            if problem is not None:
                return Finding(caller, "broken", problem[1])
        _send_verdict(connection, handshake)
    return Finding(caller, "ok", "reached this device, with the same version and key")
