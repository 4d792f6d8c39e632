"""`DoraParallel`: a module that is spread over devices and used like the plain one."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from dora.errors import DoraError, PeerLostError
from dora.partition import Chain, partition
from dora.runtime.agreement import Agreement
from dora.runtime.batch import as_call, batch_size, merge, microbatch_sizes, split, split_inputs
from dora.runtime.batchnorm import BatchNormSync
from dora.runtime.boundary import signature
from dora.runtime.checks import check_agreed, check_plan
from dora.runtime.clock import clock_offset_s
from dora.runtime.executor import Executor, Step
from dora.runtime.failure import open_board
from dora.runtime.losses import LossFn, as_loss_fn
from dora.runtime.media import shared_media
from dora.runtime.reduce import GradReducer
from dora.runtime.seeds import SeedKey
from dora.runtime.stage import StageRunner
from dora.runtime.state import ModelState, local_modules
from dora.runtime.transports import open_transport
from dora.runtime.turn import Call, Turn
from dora.scheduler import build_schedule, deadlines, validate
from dora.spec import Plan, Span, Timeline

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Planner = Callable[[Chain, Inputs, Callable[[bytes], list[bytes]]], Plan]

_PROFILE_TIMEOUT_S = 600.0
_MAX_CALLS = 10_000


class DoraParallel(nn.Module):
    """Spreads a module over the ranks of torch.distributed as a plan says.

    Every rank builds the same module, runs the same loop and passes the same batches; it keeps
    only its own blocks. Creating it and all methods that say so are collective calls.
    ::

        model = DoraParallel(model, plan, sample=inputs)
        optimizer = torch.optim.AdamW(model.parameters())
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = model.step(inputs, targets, F.cross_entropy)
            optimizer.step()

    Args:
        module: Any module that `dora.partition` can cut, or a `Chain` cut already.
        plan: Placement, or a function of (chain, sample, gather) that makes one, such as
            `dora.planned(cluster, workload, qoe)`. Rank i runs `plan.devices[i]`.
        sample: Inputs of one call, as for `step`; needed unless `module` is a Chain.
        blocks: Names of the module lists to cut at; None finds them.
        batch_dim: Dimension of the inputs along which micro-batches are cut.
        whole_inputs: Keyword inputs that go to every micro-batch uncut.
        loss_reduction: What `loss_fn` does over the samples it is given.
        outputs_to: Ranks that get the output of a forward call: 'all', or one rank.
        activation_checkpointing: Recompute blocks in backward instead of keeping activations.
        memory_limit_bytes: Of this device; None takes all of the machine's memory.
        timeout_s: Limit of every single wait for a peer.
        seed: Of dropout; None takes rank 0's torch seed.
        transport: What carries the messages: 'dora' (the engine), 'gloo', 'gloo-chunked', 'nccl'.
        key: Secret of the engine; None takes DORA_KEY; one machine needs none.

    Attributes:
        calls: When each of the last steps and requests began and ended on this rank.

    Raises:
        PartitionError: The module can not be cut.
        InfeasiblePlanError: A stage does not fit the memory of its device, or the plan is for
            another number of devices or blocks.
        ProtocolError: Ranks hold different plans.
    """

    def __init__(
        self,
        module: nn.Module | Chain,
        plan: Plan | Planner,
        *,
        sample: Any = None,
        blocks: Sequence[str] | None = None,
        batch_dim: int = 0,
        whole_inputs: Collection[str] = (),
        loss_reduction: Literal["mean", "sum"] = "mean",
        outputs_to: Literal["all"] | int = "all",
        activation_checkpointing: bool = False,
        memory_limit_bytes: int | None = None,
        timeout_s: float = 30.0,
        seed: int | None = None,
        transport: str = "dora",
        key: str | None = None,
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "DoraParallel runs one process per device: start the script with torchrun, and "
                "call torch.distributed.init_process_group('gloo') first"
            )
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self._batch_dim = batch_dim
        self._whole_inputs = tuple(whole_inputs)
        self._loss_reduction = loss_reduction
        self._output_ranks = tuple(range(world_size)) if outputs_to == "all" else (outputs_to,)
        self._calls = 0
        self._failed: str | None = None
        self._schedules: dict[tuple[bool, int, int], Turn] = {}
        self.calls: deque[Call] = deque(maxlen=_MAX_CALLS)
        self._board = open_board(self.rank)
        options: dict[str, Any] = {} if key is None else {"key": key}
        self._open = partial(open_transport, transport, **options)
        self.transport = self._open(timeout_s=timeout_s)
        self._agreement = Agreement(self.transport, self.rank, world_size, timeout_s)
        with self._guarded():
            self.chain = module if isinstance(module, Chain) else self._cut(module, sample, blocks)
            self.module = self.chain.module
            self.plan = (
                plan
                if isinstance(plan, Plan)
                else plan(self.chain, as_call(sample), self._gather_patiently)
            )
            check_plan(self.plan, self.chain, world_size)
            check_agreed(self.plan, self.chain, self.rank, memory_limit_bytes, self._agreement)
            self._build(activation_checkpointing, seed)

    # ------------------------------------------------------------ building

    def _build(self, activation_checkpointing: bool, seed: int | None) -> None:
        plan, transport = self.plan, self.transport
        self._state = ModelState(self.chain, plan, self.rank, transport, self.timeout_s)
        stage_ranks = [plan.ranks(stage.index) for stage in plan.stages]
        groups = {*self._state.holders.values(), *stage_ranks}
        transport.share_media(shared_media(plan, self.rank))
        transport.add_groups(sorted(group for group in groups if len(group) > 1))
        if not self._state.parameters:
            # Optimizers refuse an empty list; this one never gets a gradient.
            self._unused = nn.Parameter(torch.empty(0))
        self._state.equalise()
        placed = plan.placement(self.rank)
        stage = plan.stages[placed[0] if placed else 0]
        runner = StageRunner(
            self.chain, stage.first_block, stage.last_block, checkpoint=activation_checkpointing
        )
        replicas = stage_ranks[stage.index]
        modules = local_modules(self.chain, runner.units) if placed and len(replicas) > 1 else []
        self._executor = Executor(
            plan,
            self.rank,
            runner,
            transport,
            reducer=GradReducer(transport, self._state.parameters, self._state.holders),
            batchnorm=BatchNormSync(modules, transport, replicas) if modules else None,
            timeout_s=self.timeout_s,
        )
        self._schedule(training=True, count=plan.num_microbatches, offset=0)
        self._seed = self._agreement.from_rank_0(
            torch.initial_seed() if seed is None else seed, "seed"
        )
        self._clock_offset_s = clock_offset_s(
            transport, self.rank, len(plan.devices), self.timeout_s
        )

    def _cut(self, module: nn.Module, sample: Any, blocks: Sequence[str] | None) -> Chain:
        if sample is None:
            raise ValueError("sample: given nothing, allowed: the inputs of one call, as (x,)")
        args, kwargs = as_call(sample)
        size = batch_size(args, kwargs, self._batch_dim)
        sizes = [2, size - 2] if size > 2 else [size]
        pieces = split_inputs(args, kwargs, sizes, self._batch_dim, self._whole_inputs)
        return partition(module, *pieces[0], blocks=blocks)

    def _gather_patiently(self, data: bytes) -> list[bytes]:
        """Gathers profiles: a slow device measures for minutes after a fast one is done."""
        transport = self._open(timeout_s=_PROFILE_TIMEOUT_S)
        try:
            agreement = Agreement(transport, self.rank, dist.get_world_size(), _PROFILE_TIMEOUT_S)
            return agreement.gather(data, "profile")
        finally:
            transport.close()

    def _schedule(self, *, training: bool, count: int, offset: int) -> Turn:
        """Returns what this rank does with these many micro-batches."""
        key = (training, count, offset)
        if key not in self._schedules:
            routes = self.plan.routes
            turn = tuple(routes[(offset + i) % len(routes)] for i in range(count))
            plan = self.plan.model_copy(update={"num_microbatches": count, "routes": turn})
            shared = {r for ranks in self._state.holders.values() if len(ranks) > 1 for r in ranks}
            reduce_stages = {s.index for s in plan.stages if shared & set(plan.ranks(s.index))}
            schedule = build_schedule(
                plan, training=training, reduce_stages=frozenset(reduce_stages)
            )
            validate(schedule, plan)
            by_rank = schedule.actions_by_rank
            self._schedules[key] = Turn(plan, by_rank[self.rank], deadlines(by_rank, plan))
        return self._schedules[key]

    # ------------------------------------------------------------ training and inference

    def step(
        self,
        inputs: Any,
        targets: Any = None,
        loss_fn: LossFn | None = None,
    ) -> torch.Tensor:
        """Runs forward and backward of one batch; gradients add up in `parameters()`.

        A collective call. The optimizer, clipping (`clip_grad_norm_`), LR schedule and gradient
        accumulation (several calls before `optimizer.step()`) stay the user's.

        Args:
            inputs: A tensor, a tuple of positional or a mapping of keyword inputs of the module.
            targets: Nested tensors, cut into micro-batches like the inputs.
            loss_fn: (output, target) -> scalar; None takes `output.loss` or the output itself.

        Returns:
            The loss of the whole batch, a float64 scalar, equal on all ranks.

        Raises:
            PeerLostError: A peer failed or was silent for `timeout_s`.
            ProtocolError: Ranks passed different batches.
        """
        if self.plan.schedule_kind == "wavefront":
            raise ValueError("plan: schedule_kind 'wavefront' only infers, allowed: 1f1b or gpipe")
        args, kwargs = as_call(inputs)
        size = batch_size(args, kwargs, self._batch_dim)
        sizes = microbatch_sizes(size, self.plan.num_microbatches)
        turn = self._schedule(training=True, count=len(sizes), offset=0)
        mean = self._loss_reduction == "mean"
        step = Step(
            inputs=split_inputs(args, kwargs, sizes, self._batch_dim, self._whole_inputs),
            targets=split(targets, sizes, self._batch_dim),
            weights=[n / size if mean else 1.0 for n in sizes],
            routes=self.plan.routes,
            loss_fn=as_loss_fn(loss_fn, targets),
            key=SeedKey(self._seed, self._calls, 0),
            deadlines=turn.deadlines,
            header=f"train {signature(args, kwargs)}",
        )
        with self._guarded(), torch.enable_grad(), self._seeded(), self._clocked("train"):
            self._state.check_trainable()
            return torch.tensor(self._executor.train(turn.actions, step), dtype=torch.float64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Infers one batch over the stages; a collective call.

        Returns:
            The module's output on the ranks of `outputs_to`, None on the others.
        """
        if torch.is_grad_enabled() and self.training:
            raise RuntimeError(
                "forward() of DoraParallel does not record gradients: train with "
                "model.step(inputs, targets, loss_fn), or infer under torch.no_grad()"
            )
        size = batch_size(args, kwargs, self._batch_dim)
        sizes = microbatch_sizes(size, min(size, self.plan.num_microbatches))
        offset = self._calls * len(sizes) % len(self.plan.routes)
        turn = self._schedule(training=False, count=len(sizes), offset=offset)
        step = Step(
            inputs=split_inputs(args, kwargs, sizes, self._batch_dim, self._whole_inputs),
            routes=turn.plan.routes,
            key=SeedKey(self._seed, self._calls, 0),
            deadlines=turn.deadlines,
            header=f"infer {signature(args, kwargs)[0]}",
        )
        with self._guarded(), torch.no_grad(), self._seeded(), self._clocked("infer"):
            outputs = self._executor.infer(turn.actions, step, self._output_ranks)
        return merge(outputs, sizes, self._batch_dim) if outputs else None

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Counts the call and leaves the user's random generators as they were."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
        self._calls += 1

    @contextmanager
    def _clocked(self, kind: Literal["train", "infer"]) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.calls.append(Call(kind, start_s, time.perf_counter()))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Tells all ranks about a failure of this one, and wakes those that wait for it."""
        if self._failed is not None:
            raise DoraError(f"this DoraParallel failed before: {self._failed}")
        try:
            yield
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, PeerLostError):
            error = self._board.explain(error)
        self._failed = f"{type(error).__name__}: {error}"
        self._board.report(error)
        self.transport.close()
        raise error

    # ------------------------------------------------------------ parameters and state

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of this rank's blocks under the plain module's names."""
        dot, keys = f"{prefix}." if prefix else "", self.chain.parameters.keys
        for name, parameter in self._state.parameters.items():
            for key in keys[name][:1] if remove_duplicate else keys[name]:
                yield f"{dot}{key}", parameter
        if not self._state.parameters:
            yield f"{dot}unused", self._unused

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the buffers of this rank's blocks under the plain module's names."""
        dot, keys = f"{prefix}." if prefix else "", self.chain.buffers.keys
        yield from ((f"{dot}{keys[name][0]}", b) for name, b in self._state.buffers.items())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NoReturn:
        raise RuntimeError("move or cast the module before it is partitioned, not DoraParallel")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scales all gradients so that their norm over all ranks is at most `max_norm`.

        A collective call; shared parameters count once.

        Returns:
            The norm before scaling, equal on all ranks.
        """
        mine = [
            p.grad
            for name, p in self._state.parameters.items()
            if p.grad is not None and self._state.holders[name][0] == self.rank
        ]
        norm = float(torch.nn.utils.get_total_norm(mine, norm_type)) if mine else 0.0
        with self._guarded():
            rows = self._agreement.rows([norm], "clip_grad_norm_")
        norms = torch.tensor(rows, dtype=torch.float64)
        total: torch.Tensor = torch.linalg.vector_norm(norms, norm_type)
        torch.nn.utils.clip_grads_with_norm_(self._state.parameters.values(), max_norm, total)
        return total

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the plain module's whole state on every rank; a collective call."""
        if args or kwargs:
            raise TypeError("state_dict() of DoraParallel takes no arguments")
        with self._guarded():
            return self._state.gather()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes this rank's blocks from the plain module's state."""
        missing, unexpected = self._state.load(state_dict, strict=strict)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes safetensors files on rank 0, one per stage; a collective call."""
        with self._guarded():
            self._state.save(directory)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads this rank's blocks, and nothing else, from safetensors files."""
        self._state.read(path)

    # ------------------------------------------------------------ measuring

    def timeline(self) -> Timeline:
        """Returns what all ranks did in the last call, on one clock; a collective call."""
        mine = [
            {
                "rank": self.rank,
                "lane": lane,
                "label": label,
                "start_s": start + self._clock_offset_s,
                "end_s": end + self._clock_offset_s,
            }
            for lane, label, start, end in self._executor.all_spans()
        ]
        with self._guarded():
            gathered = self._agreement.gather(json.dumps(mine).encode(), "timeline")
        spans = [Span(**span) for part in gathered for span in json.loads(part)]
        return Timeline(source="measured", num_ranks=len(self.plan.devices), spans=tuple(spans))
