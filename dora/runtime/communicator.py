"""Tensors over the communication engine: any rank to any rank, by priority, and collectives."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from dora._C import Engine, Operation
from dora.errors import PeerLostError
from dora.keys import load_key
from dora.runtime.buckets import emulated_network
from dora.runtime.completions import Completions
from dora.runtime.meeting import Place, meet
from dora.runtime.pending import Pending
from dora.runtime.priority import ACTIVATION, GRADIENT, Priority, checked
from dora.runtime.rendezvous import Links
from dora.runtime.staging import Launch, Launcher, Staging
from dora.runtime.tensors import check_sizes, check_tag, checked_tensor, dtype_name

_EXIT_LINGER_S = 1.0


class Communicator:
    """The connections of one rank to all others of a job.

    `create` makes it. All methods that start something return at once, may be called from any
    thread, and take contiguous tensors on the CPU or a CUDA device.
    """

    def __init__(self, engine: Engine, rank: int, world_size: int, place: Place) -> None:
        self.place = place
        self.engine = engine
        self.rank = rank
        self.world_size = world_size
        self._pid = os.getpid()
        self._is_closed = False
        self._launcher: Launcher | None = None
        self._lock = threading.Lock()
        self._turns = 0
        self.completions = Completions()
        atexit.register(self.close)

    @classmethod
    def create(
        cls,
        store: Store,
        rank: int,
        world_size: int,
        *,
        key: bytes | str | None = None,
        key_file: str | Path | None = None,
        host: str | None = None,
        timeout_s: float = 60.0,
        epoch: int = 0,
        links: Links | None = None,
        **engine_options: Any,
    ) -> Communicator:
        """Connects all ranks; a collective call, but for a rank that comes to a job that runs.

        Args:
            store: A c10d Store that all ranks share; they find one another through it.
            rank: This process.
            world_size: Number of ranks.
            key: Shared secret; None takes `key_file`, DORA_KEY or DORA_KEY_FILE. Ranks that share
                one machine's loopback need none.
            key_file: A file that holds the secret.
            host: Address to listen on; None takes the one from which the store is reached.
            timeout_s: Limit of finding all ranks.
            epoch: Of the membership.
            links: What is known of the paths.
            engine_options: Of `dora._C.Engine`.

        Raises:
            PeerLostError: A rank did not come, or could not be reached.
            SpecError: No secret, or one that is too short.
        """
        engine, place = meet(
            store,
            rank,
            world_size,
            key=load_key(key, key_file),
            host=host,
            timeout_s=timeout_s,
            epoch=epoch,
            links=links or Links(),
            options={**emulated_network(), **engine_options},
        )
        return cls(engine, rank, world_size, place)

    def move(self, engine: Engine, epoch: int, world_size: int) -> Callable[[], None]:
        """Goes over to other connections; returns what closes those before."""
        close = partial(self.completions.close_with, self.engine, _EXIT_LINGER_S)
        self.engine, self.world_size = engine, world_size
        self.completions = Completions()  # one engine does not know another one's operations
        self.place = self.place._replace(epoch=epoch, notice=None)
        return close

    # ------------------------------------------------------------ messages

    def send(
        self,
        tensor: torch.Tensor,
        dst: int,
        *,
        group: int = 0,
        tag: int = 0,
        priority: Priority = ACTIVATION,
        timeout_s: float = 60.0,
        action: str = "send",
    ) -> Pending:
        """Starts a send; leave the tensor unchanged until it is done."""
        self._check_peer(dst, "dst")
        check_tag(tag)
        stage = Staging()
        host = stage.reads(checked_tensor(tensor))
        address, num_bytes = host.data_ptr(), host.nbytes
        options = _options(group, priority, timeout_s)
        return self._start(
            lambda: self.engine.send(
                address, num_bytes, dst, tag=tag, unit_bytes=priority.unit_bytes, **options
            ),
            stage,
            host,
            action=action,
            peer=f"rank {dst}",
            timeout_s=timeout_s,
        )

    def receive(
        self,
        tensor: torch.Tensor,
        src: int | None,
        *,
        group: int = 0,
        tag: int = 0,
        timeout_s: float = 60.0,
        action: str = "receive",
    ) -> Pending:
        """Posts a receive; `src` None takes the first message with that tag from anybody."""
        if src is not None:
            self._check_peer(src, "src")
        check_tag(tag)
        stage = Staging()
        host = stage.writes(checked_tensor(tensor))
        address, num_bytes = host.data_ptr(), host.nbytes
        source = -1 if src is None else src
        return self._start(
            lambda: self.engine.receive(
                address, num_bytes, source, group=group, tag=tag, timeout_s=timeout_s
            ),
            stage,
            host,
            action=action,
            peer="any rank" if src is None else f"rank {src}",
            timeout_s=timeout_s,
        )

    # ------------------------------------------------------------ collectives

    def all_reduce(
        self,
        tensor: torch.Tensor,
        ranks: Sequence[int],
        *,
        op: str = "sum",
        shares: Sequence[float] = (),
        group: int = 0,
        priority: Priority = GRADIENT,
        timeout_s: float = 60.0,
        action: str = "all_reduce",
    ) -> Pending:
        """Starts reducing `tensor` over `ranks`, in place.

        Args:
            tensor: Same shape and dtype on all ranks.
            ranks: Who takes part, in the same order on all of them.
            op: sum, product, min or max.
            shares: One per rank: the result is the sum of share * tensor.
            group: Calls of one group are matched in the order in which they are made.
            priority: Of its messages.
            timeout_s: Limit of the whole.
            action: What it is, for messages.
        """
        stage = Staging()
        host = stage.updates(checked_tensor(tensor))
        dtype = dtype_name(tensor)
        address, count = host.data_ptr(), host.numel()
        options = _options(group, priority, timeout_s)
        return self._start(
            lambda: self.engine.all_reduce(
                address, count, dtype, op, ranks, shares=shares, **options
            ),
            stage,
            host,
            action=action,
            peer=self._others(ranks),
            timeout_s=timeout_s,
        )

    def reduce_scatter(
        self,
        inputs: torch.Tensor,
        output: torch.Tensor,
        ranks: Sequence[int],
        *,
        op: str = "sum",
        group: int = 0,
        priority: Priority = GRADIENT,
        timeout_s: float = 60.0,
    ) -> Pending:
        """Starts reducing `inputs`; `output` gets the segment of this rank's place in `ranks`."""
        check_sizes(inputs, output, len(ranks), "reduce_scatter: input")
        stage = Staging()
        source, target = stage.reads(checked_tensor(inputs)), stage.writes(checked_tensor(output))
        dtype = dtype_name(inputs)
        addresses, count = (source.data_ptr(), target.data_ptr()), target.numel()
        options = _options(group, priority, timeout_s)
        return self._start(
            lambda: self.engine.reduce_scatter(*addresses, count, dtype, op, ranks, **options),
            stage,
            source,
            target,
            action="reduce_scatter",
            peer=self._others(ranks),
            timeout_s=timeout_s,
        )

    def all_gather(
        self,
        tensor: torch.Tensor,
        output: torch.Tensor,
        ranks: Sequence[int],
        *,
        group: int = 0,
        priority: Priority = GRADIENT,
        timeout_s: float = 60.0,
    ) -> Pending:
        """Starts collecting everybody's `tensor` into `output`, in the order of `ranks`."""
        check_sizes(output, tensor, len(ranks), "all_gather: output")
        stage = Staging()
        source, target = stage.reads(checked_tensor(tensor)), stage.writes(checked_tensor(output))
        addresses, num_bytes = (source.data_ptr(), target.data_ptr()), source.nbytes
        options = _options(group, priority, timeout_s)
        return self._start(
            lambda: self.engine.all_gather(*addresses, num_bytes, ranks, **options),
            stage,
            source,
            target,
            action="all_gather",
            peer=self._others(ranks),
            timeout_s=timeout_s,
        )

    def broadcast(
        self,
        tensor: torch.Tensor,
        root: int,
        ranks: Sequence[int],
        *,
        group: int = 0,
        priority: Priority = GRADIENT,
        timeout_s: float = 60.0,
        action: str = "broadcast",
    ) -> Pending:
        """Starts copying `tensor` from rank `root` to `ranks`."""
        stage = Staging()
        stages = stage.reads if root == self.rank else stage.writes
        host = stages(checked_tensor(tensor))
        address, num_bytes = host.data_ptr(), host.nbytes
        options = _options(group, priority, timeout_s)
        return self._start(
            lambda: self.engine.broadcast(address, num_bytes, root, ranks, **options),
            stage,
            host,
            action=action,
            peer=self._others(ranks) if root == self.rank else f"rank {root}",
            timeout_s=timeout_s,
        )

    def barrier(self, ranks: Sequence[int], *, group: int = 0, timeout_s: float = 60.0) -> Pending:
        """Starts waiting until all `ranks` have called it."""
        return self._start(
            lambda: self.engine.barrier(ranks, group=group, timeout_s=timeout_s),
            Staging(),
            action="barrier",
            peer=self._others(ranks),
            timeout_s=timeout_s,
        )

    # ------------------------------------------------------------ for Pending

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child, whose engine has no threads."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this communicator belongs to process {self._pid}, given process {os.getpid()}: "
                "connections do not survive a fork; start processes with spawn or forkserver"
            )

    def keep(
        self,
        started: Operation | Launch,
        completions: Completions,
        tensors: Sequence[Any],
        finish: Callable[[], None] | None,
    ) -> None:
        """Takes over an operation that its owner has dropped, with the memory it uses."""

        def over(operation: Operation) -> None:
            if tensors and finish is not None and operation.outcome == "done":
                finish()

        def launched() -> None:
            operation = started.operation if isinstance(started, Launch) else started
            if operation is not None:
                completions.watch(operation, lambda: over(operation))

        if os.getpid() != self._pid:
            return
        if isinstance(started, Launch):
            started.then(launched)
        else:
            launched()

    def next_turn(self) -> int:
        """Counts its users: the same number on all ranks if they come in the same order."""
        self._turns += 1
        return self._turns

    def close(self, linger_s: float = _EXIT_LINGER_S) -> None:
        """Lets sends leave, and be read, for `linger_s` each; fails the rest; may be repeated."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        atexit.unregister(self.close)
        if self._launcher is not None:
            self._launcher.close()
        self.completions.close_with(self.engine, linger_s)

    def _start(
        self,
        begin: Callable[[], Operation],
        stage: Staging,
        *tensors: torch.Tensor,
        action: str,
        peer: str,
        timeout_s: float,
    ) -> Pending:
        self.check_process()
        if self._is_closed:
            raise PeerLostError(
                f"rank {self.rank}: {action} with {peer} failed: this rank closed its connections"
            )
        started: Operation | Launch
        if self._launcher is None and stage.event is None:
            started = begin()
        else:
            with self._lock:
                self._launcher = self._launcher or Launcher()
            started = self._launcher.post(begin, stage.event)
        return Pending(
            self,
            started,
            tensors,
            action=action,
            peer=peer,
            timeout_s=timeout_s,
            finish=None if stage.event is None else stage.finish,
        )

    def _check_peer(self, peer: int, name: str) -> None:
        if peer == self.rank or not 0 <= peer < self.world_size:
            raise ValueError(
                f"{name}: given rank {peer}, allowed: another rank from 0 to {self.world_size - 1}"
            )

    def _others(self, ranks: Sequence[int]) -> str:
        return f"ranks {[rank for rank in ranks if rank != self.rank]}"


def _options(group: int, priority: Priority, timeout_s: float) -> dict[str, Any]:
    traffic_class, deadline, _ = checked(priority)
    return {
        "group": group,
        "traffic_class": traffic_class,
        "deadline": deadline,
        "timeout_s": timeout_s,
    }
