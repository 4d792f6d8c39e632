"""The torch.distributed backend "dora": every collective and message over a Communicator.

Call `register` once, then `torch.distributed.init_process_group("dora")`. Nothing registers at
import: torch's choice of a default backend changes as soon as any other one is registered.

The priority of a message is taken from, in this order: bits 28-30 of its tag (its class; the rest
of the tag is what is matched), the innermost `priority` block, its kind.
"""

# torch declares overloads that nobody calls on a group.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dora.errors import DoraError, PeerLostError
from dora.runtime.communicator import Communicator
from dora.runtime.group import CLASS_SHIFT, NAME, Group, kind_or_chosen
from dora.runtime.pending import Pending, Together
from dora.runtime.pieces import divide, only, reduction, rows_of, unpacking, whole_of
from dora.runtime.priority import GRADIENT
from dora.runtime.tensors import checked_tensor
from dora.runtime.work import DoraWork

# Tags of the collectives that consist of messages: above all tags of users.
_GATHER_TAG, _SCATTER_TAG, _ALL_TO_ALL_TAG, _MONITOR_TAG = (i << CLASS_SHIFT for i in range(1, 5))


def register(**options: Any) -> None:
    """Makes `torch.distributed.init_process_group("dora")` work; call it once, before that.

    Args:
        options: Defaults of `Communicator.create`, such as `key_file`, `host` or `protection`;
            `pg_options={...}` of a process group goes before them.
    """

    def create(given: Any, own: Mapping[str, Any] | None) -> DoraProcessGroup:
        return _create(given, {**options, **(own or {})})

    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def _create(given: Any, options: Mapping[str, Any]) -> DoraProcessGroup:
    rank, size, timeout_s = given.group_rank, given.group_size, given.timeout.total_seconds()
    ranks = list(given.global_ranks_in_group) or list(range(size))
    default = dist.group.WORLD
    if isinstance(default, DoraProcessGroup):
        communicator = default.communicator
    else:
        options = {"timeout_s": timeout_s, **options}
        communicator = Communicator.create(given.store, rank, size, **options)
        ranks = list(range(size))
    return DoraProcessGroup(
        communicator,
        given.store,
        ranks,
        name=given.group_id,
        timeout_s=timeout_s,
        is_owner=communicator is not getattr(default, "communicator", None),
    )


class DoraProcessGroup(Group):
    """All collectives of a group; see `Group`."""

    # ------------------------------------------------------------ to all

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> DoraWork:
        """Starts copying a tensor of the root to all."""
        root = self.members[opts.rootRank if opts is not None else 0]
        parts = [
            self.usable().broadcast(tensor, root, self.members, **self.how(opts))
            for tensor in tensors
        ]
        return DoraWork(Together(parts), tensors)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> DoraWork:
        """Starts reducing tensors in place."""
        parts = [self._all_reduce(tensor, opts) for tensor in tensors]
        return DoraWork(Together(parts), tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> DoraWork:
        """Starts reducing a tensor to the root; those of the others stay as they are."""
        tensor = only(tensors)
        is_root = opts.rootRank == self.rank()
        pending = self._all_reduce(tensor if is_root else tensor.clone(), opts)
        return DoraWork(pending, tensors)

    def _all_reduce(self, tensor: torch.Tensor, opts: Any) -> Pending:
        op, is_average = reduction(opts, tensor)
        if tensor.dtype is torch.bool:
            tensor = checked_tensor(tensor).view(torch.uint8)
        size = self.size()
        return self.usable().all_reduce(
            tensor,
            self.members,
            op=op,
            shares=[1 / size] * size if is_average else (),
            **self.how(opts),
        )

    def barrier(self, opts: Any = None) -> DoraWork:
        """Starts waiting for all."""
        how = self.how(opts)
        del how["priority"]
        return DoraWork(self.usable().barrier(self.members, **how))

    def monitored_barrier(
        self, timeout: timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        """Waits for all; rank 0 names those that do not come within `timeout`."""
        timeout_s = timeout.total_seconds() if timeout else self._timeout_s
        note = torch.zeros(1, dtype=torch.uint8)
        tag, action = _MONITOR_TAG, "monitored_barrier"
        others = range(1, self.size())
        if self.rank() != 0:
            self.post_send(note, 0, tag, GRADIENT, action, timeout_s).wait()
            self.post_receive(note, 0, tag, action, timeout_s).wait()
            return
        came = {src: self.post_receive(note, src, tag, action, timeout_s) for src in others}
        errors: dict[int, DoraError] = {}
        for src, pending in came.items():
            try:
                pending.wait(timeout_s)
            except DoraError as error:
                errors[src] = error
                if not wait_all_ranks:
                    break
        if errors:
            for pending in came.values():
                pending.cancel()
            reasons = "; ".join(str(error) for error in errors.values())
            raise PeerLostError(f"monitored_barrier: ranks {[*errors]} did not come: {reasons}")
        Together([self.post_send(note, dst, tag, GRADIENT, action) for dst in others]).wait(
            timeout_s
        )

    # ------------------------------------------------------------ gathering

    def all_gather_single(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> DoraWork:
        """Starts collecting everybody's tensor into one."""
        pending = self.usable().all_gather(tensor, output, self.members, **self.how(opts))
        return DoraWork(pending, [output])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> DoraWork:
        """Starts several of `all_gather_single`."""
        parts = [
            self.usable().all_gather(tensor, output, self.members, **self.how(opts))
            for output, tensor in zip(outputs, tensors, strict=True)
        ]
        return DoraWork(Together(parts), outputs)

    def allgather(
        self,
        outputs: list[list[torch.Tensor]],
        tensors: list[torch.Tensor],
        opts: Any = None,
    ) -> DoraWork:
        """Starts collecting everybody's tensors into lists."""
        parts = []
        for targets, tensor in zip(outputs, tensors, strict=True):
            whole = whole_of(targets, tensor, self.size(), "all_gather: output list")
            parts.append(
                Together(
                    [self.usable().all_gather(tensor, whole, self.members, **self.how(opts))],
                    unpacking(whole, targets),
                )
            )
        return DoraWork(Together(parts), [t for targets in outputs for t in targets])

    def allgather_coalesced(
        self,
        outputs: list[list[torch.Tensor]],
        tensors: list[torch.Tensor],
        opts: Any = None,
    ) -> DoraWork:
        """Starts collecting everybody's tensors; one list per rank."""
        return self.allgather(
            [list(per_rank) for per_rank in zip(*outputs, strict=True)], tensors, opts
        )

    def gather(
        self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any
    ) -> DoraWork:
        """Starts collecting everybody's tensor at the root."""
        tensor, root = only(tensors), opts.rootRank
        priority, timeout_s = kind_or_chosen(GRADIENT), self.limit(opts)
        if self.rank() != root:
            pending = self.post_send(tensor, root, _GATHER_TAG, priority, "gather", timeout_s)
            return DoraWork(pending)
        targets = only(outputs)
        parts = [
            self.post_receive(target, src, _GATHER_TAG, "gather", timeout_s)
            for src, target in enumerate(targets)
            if src != root
        ]
        targets[root].copy_(tensor)
        return DoraWork(Together(parts), targets)

    def scatter(
        self, outputs: list[torch.Tensor], tensors: list[list[torch.Tensor]], opts: Any
    ) -> DoraWork:
        """Starts handing one tensor of the root to everybody."""
        output, root = only(outputs), opts.rootRank
        priority, timeout_s = kind_or_chosen(GRADIENT), self.limit(opts)
        if self.rank() != root:
            pending = self.post_receive(output, root, _SCATTER_TAG, "scatter", timeout_s)
            return DoraWork(pending, outputs)
        sources = only(tensors)
        parts = [
            self.post_send(source, dst, _SCATTER_TAG, priority, "scatter", timeout_s)
            for dst, source in enumerate(sources)
            if dst != root
        ]
        output.copy_(sources[root])
        return DoraWork(Together(parts), outputs)

    # ------------------------------------------------------------ reducing parts

    def reduce_scatter_single(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> DoraWork:
        """Starts reducing a tensor; everybody gets one part."""
        return DoraWork(self._reduce_scatter(output, tensor, opts), [output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> DoraWork:
        """Starts several of `reduce_scatter_single`."""
        parts = [
            self._reduce_scatter(output, tensor, opts)
            for output, tensor in zip(outputs, tensors, strict=True)
        ]
        return DoraWork(Together(parts), outputs)

    def reduce_scatter(
        self,
        outputs: list[torch.Tensor],
        tensors: list[list[torch.Tensor]],
        opts: Any = None,
    ) -> DoraWork:
        """Starts reducing lists of tensors; everybody gets one of the list."""
        parts = []
        for output, sources in zip(outputs, tensors, strict=True):
            whole = whole_of(sources, output, self.size(), "reduce_scatter: input list")
            torch.stack([source.reshape(output.shape) for source in sources], out=whole)
            parts.append(self._reduce_scatter(output, whole, opts))
        return DoraWork(Together(parts), outputs)

    def _reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any) -> Together:
        op, is_average = reduction(opts, tensor)
        pending = self.usable().reduce_scatter(
            tensor, output, self.members, op=op, **self.how(opts)
        )
        size = self.size()
        return Together([pending], (lambda: divide(output, size)) if is_average else None)

    # ------------------------------------------------------------ all to all

    def alltoall(
        self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None
    ) -> DoraWork:
        """Starts sending one tensor to each and receiving one from each."""
        return DoraWork(self._all_to_all(outputs, tensors, opts), outputs)

    def _all_to_all(
        self, outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], opts: Any
    ) -> Together:
        priority, timeout_s = kind_or_chosen(GRADIENT), self.limit(opts)
        rank, action, tag = self.rank(), "all_to_all", _ALL_TO_ALL_TAG
        others = [peer for peer in range(self.size()) if peer != rank]
        parts = [self.post_receive(outputs[src], src, tag, action, timeout_s) for src in others]
        parts += [
            self.post_send(tensors[dst], dst, tag, priority, action, timeout_s) for dst in others
        ]
        outputs[rank].copy_(tensors[rank])
        return Together(parts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: Any = None,
    ) -> DoraWork:
        """Starts exchanging parts of a tensor along its first dimension; no sizes: equal ones."""
        outputs = rows_of(output, output_sizes, self.size())
        tensors = rows_of(tensor, input_sizes, self.size())
        return DoraWork(self._all_to_all(outputs, tensors, opts), [output])

    # torch's older names.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
