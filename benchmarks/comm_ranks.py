"""The ranks of bench_comm.py: one process per node, driven by commands over a pipe.

A scenario is a list of transfers. Every rank first posts what it will receive; at one common
moment the senders start. All nodes share CLOCK_MONOTONIC, so a message's time is the moment when
its receiver has it minus the moment when its sender posted it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import comm_wires as wires
import torch
from comm_pipeline import Pipelines
from common import context
from netns import LOOPBACK, Node, enter

_ARENA_BYTES = 64 << 20
_CALL_TIMEOUT_S = 180.0  # of any command: longer than every wait inside it
_START_DELAY_S = 0.02  # until all ranks have heard of the common moment
_PR_SET_PDEATHSIG = 1  # sys/prctl.h


@dataclass(frozen=True)
class Transfer:
    """A message, or a sum of two ranks; times count from the common start.

    A receive is posted before the start unless `receive_s` says when.
    """

    src: int
    dst: int
    num_bytes: int
    is_urgent: bool = False
    send_s: float = 0.0
    receive_s: float | None = None
    is_all_reduce: bool = False


@dataclass
class Played:
    """Moments of the transfers, by index, and what all ranks spent."""

    sent_s: dict[int, float]
    awaited_s: dict[int, float]  # when a late receive was posted
    done_s: dict[int, float]
    cpu_s: float = 0.0

    def duration_s(self, index: int) -> float:
        return self.done_s[index] - self.sent_s[index]

    @property
    def span_s(self) -> float:
        """From the first send until all is received."""
        return max(self.done_s.values()) - min(self.sent_s.values())


# ------------------------------------------------------------ in the rank's process


class Rank:
    """What a rank can be told to do; methods are commands."""

    def __init__(self, rank: int, nodes: Sequence[Node]) -> None:
        enter(nodes[rank].namespace)
        torch.set_num_threads(1)
        self._rank = rank
        self._nodes = nodes
        self._wires: dict[str, wires.Wire] = {}
        self._pool = ThreadPoolExecutor(2)  # one waits for urgent messages, one for the others
        generator = torch.Generator().manual_seed(7)
        self._source = torch.randint(256, (_ARENA_BYTES,), dtype=torch.uint8, generator=generator)
        self._arena = torch.zeros(_ARENA_BYTES, dtype=torch.uint8)

    def start_gloo(self, port: int) -> str:
        """Returns the congestion control of this rank's connections."""
        self._wires.update(wires.start_gloo(self._nodes, self._rank, port))
        return wires.congestion_control()

    def listen(self, engines: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """Opens all ports; returns them by contender."""
        self._server = wires.listen_raw(self._nodes[self._rank])
        self._engines = wires.start_engines(self._rank, engines)
        ports = {name: engine.port for name, engine in self._engines.items()}
        return {"raw TCP": self._server.getsockname()[1], **ports}

    def connect(self, ports: Sequence[Mapping[str, int]], is_medium_shared: bool) -> None:
        """Connects with all ranks, whose ports these are."""
        here = list(zip((node.address for node in self._nodes), ports, strict=True))
        peer = here[1][0], here[1][1]["raw TCP"]
        self._wires.update(wires.connect_raw(self._rank, self._server, peer))
        for name, engine in self._engines.items():
            self._wires[name] = wires.connect_engine(
                engine,
                self._rank,
                [(address, of[name]) for address, of in here],
                is_medium_shared=is_medium_shared,
            )

    # ---- transfers

    def prepare(self, name: str, transfers: Sequence[Transfer]) -> None:
        """Clears the memory and posts the receives that do not come late."""
        self._transfers, self._wire = transfers, self._wires[name]
        self._slices = _slices(transfers)
        for transfer, cut in zip(transfers, self._slices, strict=True):
            self._arena[cut].view(torch.float32).fill_(1.0 if transfer.is_all_reduce else 0.0)
        self._cpu_s = _cpu_s()
        self._played = Played({}, {}, {})
        lanes: dict[bool, list[tuple[int, wires.Wait]]] = {False: [], True: []}
        for i, transfer in enumerate(transfers):
            if self._receives(transfer) and transfer.receive_s is None:
                lanes[transfer.is_urgent].append((i, self._post_receive(i)))
        self._waiting = [self._pool.submit(self._stamp, lane) for lane in lanes.values() if lane]

    def run(self, start_s: float) -> Played:
        """Does this rank's share of the prepared transfers."""
        agenda = []
        for i, transfer in enumerate(self._transfers):
            if self._rank == transfer.src or self._reduces(transfer):
                agenda.append((transfer.send_s, i, self._send))
            if self._receives(transfer) and transfer.receive_s is not None:
                agenda.append((transfer.receive_s, i, self._receive_late))
        sends = []
        for after_s, i, act in sorted(agenda, key=lambda entry: entry[0]):
            time.sleep(max(0.0, start_s + after_s - time.monotonic()))
            sends.append(act(i))
        for wait in sends:
            wait()
        for waiting in self._waiting:
            waiting.result(wires.WAIT_S)
        self._played.cpu_s = _cpu_s() - self._cpu_s
        self._check()
        return self._played

    def _receives(self, transfer: Transfer) -> bool:
        return self._rank == transfer.dst and not transfer.is_all_reduce

    def _reduces(self, transfer: Transfer) -> bool:
        return transfer.is_all_reduce and self._rank in (transfer.src, transfer.dst)

    def _post_receive(self, i: int) -> wires.Wait:
        transfer = self._transfers[i]
        into = self._arena[self._slices[i]]
        return self._wire.receive(into, transfer.src, i, transfer.is_urgent)

    def _receive_late(self, i: int) -> wires.Wait:
        self._played.awaited_s[i] = time.monotonic()
        self._stamp([(i, self._post_receive(i))])
        return lambda: None

    def _send(self, i: int) -> wires.Wait:
        transfer = self._transfers[i]
        cut = self._slices[i]
        self._played.sent_s[i] = time.monotonic()
        if transfer.is_all_reduce:
            wait = self._wire.all_reduce(self._arena[cut].view(torch.float32))
            self._waiting.append(self._pool.submit(self._stamp, [(i, wait)]))
            return lambda: None
        return self._wire.send(self._source[cut], transfer.dst, i, transfer.is_urgent)

    def _stamp(self, waits: Sequence[tuple[int, wires.Wait]]) -> None:
        for i, wait in waits:
            wait()
            self._played.done_s[i] = time.monotonic()

    def _check(self) -> None:
        for transfer, cut in zip(self._transfers, self._slices, strict=True):
            got, sent = (x[cut].view(torch.int64) for x in (self._arena, self._source))
            is_right = (
                bool((got.view(torch.float32) == 2.0).all())
                if self._reduces(transfer)
                else not self._receives(transfer) or torch.equal(got, sent)
            )
            assert is_right, f"rank {self._rank}: {transfer} arrived altered"

    # ---- other commands

    def round_trips(self, name: str, num_bytes: int, count: int) -> list[float]:
        """Returns seconds of each on rank 0, which rank 1 answers."""
        wire, peer = self._wires[name], 1 - self._rank
        out, into = self._source[:num_bytes], self._arena[:num_bytes]
        times = []
        for _ in range(count):
            start = time.perf_counter()
            arrived = wire.receive(into, peer, 0, True)
            if self._rank == 1:
                arrived()
            sent = wire.send(out, peer, 0, True)
            if self._rank == 0:
                arrived()
            times.append(time.perf_counter() - start)
            sent()
        return times

    def build_pipelines(self, options: Mapping[str, Any]) -> None:
        self._pipelines = Pipelines(self._rank, **options)

    def pipeline_step(self, name: str) -> tuple[float, float]:
        return self._pipelines.step(name)


def _slices(transfers: Sequence[Transfer]) -> list[slice]:
    """Returns where each message lives: side by side, from the start again if there is no room."""
    result, end = [], 0
    for transfer in transfers:
        start = end if end + transfer.num_bytes <= _ARENA_BYTES else 0
        end = start + transfer.num_bytes
        result.append(slice(start, end))
    return result


def _free_port() -> int:
    """Returns a port that is free on loopback; in a new namespace all are."""
    with socket.create_server((LOOPBACK.address, 0)) as server:
        return int(server.getsockname()[1])


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _rank_main(end: Any, rank: int, nodes: Sequence[Node]) -> None:
    # Ctrl-C reaches the whole terminal; the parent ends its ranks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        here = Rank(rank, nodes)
        end.send((None, ""))
        while True:
            name, args = end.recv()
            end.send((getattr(here, name)(*args), ""))
    except (EOFError, BrokenPipeError):
        pass
    except Exception:
        end.send((None, traceback.format_exc()))
    os._exit(0)  # the rank may hold operations that nobody will complete


# ------------------------------------------------------------ in the parent


class Ranks:
    """A process per node; a context manager that ends them.

    Args:
        nodes: Rank -> where it lives.
        engines: Contender -> options of its engine.
        is_medium_shared: Tells engines that all nodes share one medium.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        engines: Mapping[str, Mapping[str, Any]],
        *,
        is_medium_shared: bool = False,
    ) -> None:
        # Namespaces have no name service: do not warn of each address that has no name.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self._ends, self._processes = [], []
        try:
            for rank in range(len(nodes)):
                self._start(rank, nodes)
            self._answers()
            self.congestion_control = self.call("start_gloo", _free_port())[0]
            self.call("connect", self.call("listen", engines), is_medium_shared)
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, nodes: Sequence[Node]) -> None:
        here, there = context.Pipe()
        process = context.Process(target=_rank_main, args=(there, rank, nodes), daemon=True)
        process.start()
        there.close()
        self._ends.append(here)
        self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Returns what each rank answers to a command."""
        for end in self._ends:
            end.send((name, args))
        return self._answers()

    def _answers(self) -> list[Any]:
        results = []
        for rank, end in enumerate(self._ends):
            if not end.poll(_CALL_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {_CALL_TIMEOUT_S:g} s")
            value, failure = end.recv()
            if failure:
                raise RuntimeError(f"rank {rank}: {failure}")
            results.append(value)
        return results

    def play(self, name: str, transfers: Sequence[Transfer]) -> Played:
        """Returns the moments of transfers that contender `name` carried."""
        self.call("prepare", name, transfers)
        parts = self.call("run", time.monotonic() + _START_DELAY_S)
        whole = Played({}, {}, {}, sum(part.cpu_s for part in parts))
        for part in parts:
            whole.awaited_s |= part.awaited_s
            for i, moment in part.sent_s.items():
                whole.sent_s[i] = min(moment, whole.sent_s.get(i, moment))
            for i, moment in part.done_s.items():
                whole.done_s[i] = max(moment, whole.done_s.get(i, moment))
        return whole
