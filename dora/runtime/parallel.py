"""`DoraParallel`: a module that is spread over devices and used like the plain one."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from dora.errors import DoraError, PeerLostError
from dora.live.environment import watch_as_told
from dora.partition import Chain, partition
from dora.runtime import generation
from dora.runtime.adaptive import Adapter, AdaptiveModule, adapter_of
from dora.runtime.agreement import Agreement
from dora.runtime.batch import as_call, batch_size, merge, microbatch_sizes, split, split_inputs
from dora.runtime.boundary import signature
from dora.runtime.build import build_executor
from dora.runtime.clock import clock_offset_s
from dora.runtime.executor import Step
from dora.runtime.failure import open_board
from dora.runtime.guard import CodecReport, GuardedExecutor
from dora.runtime.joining import come, is_late
from dora.runtime.losses import LossFn, as_loss_fn
from dora.runtime.media import shared_media
from dora.runtime.replan import Policy, num_seats
from dora.runtime.seeds import SeedKey
from dora.runtime.state import ModelState
from dora.runtime.transports import open_transport
from dora.runtime.turn import Call, Turn
from dora.scheduler import build_schedule, deadlines, validate
from dora.spec import Plan, Span, Timeline

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Planner = Callable[[Chain, Inputs, Callable[[bytes], list[bytes]]], Plan]

_PROFILE_TIMEOUT_S = 600.0
_MAX_CALLS = 10_000


class DoraParallel(AdaptiveModule):
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
        snapshot_interval: Go on after the loss of a device, from copies of the training state that
            are made every so many optimizer steps; 0 makes none, None ends the job on a loss.
        replan: Returns the plan to go on with, given the names of all devices that are gone; None
            takes the first of `bank` that does without them, or gives their blocks to others.
        bank: Plans for the case of a loss, the best first.
        rescue_dir: Folder for what is left of the model when it is not enough to go on.
        adapter: Switches plans as the world changes: `dora.adapt.adapting`, 'auto' (of `planned`).

    Attributes:
        calls: When each of the last steps and requests began and ended on this rank.

    Raises:
        PartitionError: The module can not be cut.
        InfeasiblePlanError: A stage does not fit the memory of its device, or the plan is for
            another number of devices or blocks.
        ProtocolError: Ranks hold different plans.
    """

    _executor: GuardedExecutor

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
        snapshot_interval: int | None = None,
        replan: Callable[[tuple[str, ...]], Plan] | None = None,
        bank: Sequence[Plan] = (),
        rescue_dir: str | os.PathLike[str] = "dora-rescue",
        adapter: Adapter | Literal["auto", "off"] | None = "auto",
    ) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "DoraParallel runs one process per device: start the script with torchrun, and "
                "call torch.distributed.init_process_group('gloo') first"
            )
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self._world_size = world_size
        self._batch_dim = batch_dim
        self._whole_inputs = tuple(whole_inputs)
        self._loss_reduction = loss_reduction
        self._outputs_to = outputs_to
        self._calls = 0
        self._is_checkpointing = activation_checkpointing
        self._failed: str | None = None
        self._schedules: dict[tuple[bool, int, int], Turn] = {}
        self._memory_limit_bytes = memory_limit_bytes
        self.calls: deque[Call] = deque(maxlen=_MAX_CALLS)
        self._board = open_board(self.rank)
        options: dict[str, Any] = {} if key is None else {"key": key}
        self._open = partial(open_transport, transport, **options)
        self.transport = self._open(timeout_s=timeout_s)
        self.members = tuple(range(world_size))
        self._agreement = Agreement(self.transport, self.rank, self.members, timeout_s)
        with self._guarded():
            self.chain = module if isinstance(module, Chain) else self._cut(module, sample, blocks)
            self.module = self.chain.module
            wishes = replan, tuple(bank), Path(rescue_dir)
            policy = None if snapshot_interval is None else Policy(snapshot_interval, *wishes)
            if is_late(self.transport):
                come(self, policy)
            else:
                given = self.chain, as_call(sample), self._gather_patiently
                self.plan = plan if isinstance(plan, Plan) else plan(*given)
                self._world_size = num_seats(self.plan, world_size, policy)
                self._check(self.plan)
                self._build(seed)
                self._survive(policy)
            self._adapter = adapter_of(adapter, plan, is_lasting=policy is not None)
            watch_as_told(self, self._adapter, plan)

    # ------------------------------------------------------------ building

    def _build(self, seed: int | None) -> None:
        self._state = ModelState(self.chain, self.plan, self.rank, self.transport, self.timeout_s)
        self.resident = (self.plan,)
        # Optimizers refuse an empty list; this one never gets a gradient.
        self._unused = nn.Parameter(torch.empty(0))
        self._settle()
        self._state.equalise()
        parameters = self._state.parameters
        self._optimizers.hold(parameters, {}, None if parameters else self._unused)
        self._seed = self._agreement.from_first(
            torch.initial_seed() if seed is None else seed, "seed"
        )
        self._clock_offset_s = clock_offset_s(
            self.transport, self.rank, self.members[1:], self.timeout_s
        )

    def _settle(self) -> None:
        """Makes all that depends on the plan; this rank holds what the plan wants of it."""
        plan, transport, state = self.plan, self.transport, self._state
        stage_ranks = [plan.ranks(stage.index) for stage in plan.stages]
        groups = {*state.holders.values(), *stage_ranks}
        transport.share_media(shared_media(plan, self.rank, self.members))
        transport.add_groups(sorted(group for group in groups if len(group) > 1))
        if hasattr(self, "_executor"):
            self._executor.reducer.close()
        self._executor, self._schedules = self._make_executor(plan), {}
        self._schedule(training=True, count=plan.num_microbatches, offset=0)

    def _make_executor(self, plan: Plan) -> GuardedExecutor:
        executor = build_executor(
            self.chain,
            plan,
            self.rank,
            self.transport,
            state=self._state,
            agreement=self._agreement,
            activation_checkpointing=self._is_checkpointing,
            timeout_s=self.timeout_s,
        )
        executor.members = self.members
        return executor

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
            agreement = Agreement(transport, self.rank, self.members, _PROFILE_TIMEOUT_S)
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
        self._adapt("train")
        self._stand_alone()
        if self.plan.schedule_kind == "wavefront":
            raise ValueError("plan: schedule_kind 'wavefront' only infers, allowed: 1f1b or gpipe")
        args, kwargs = as_call(inputs)
        size = batch_size(args, kwargs, self._batch_dim)
        microbatch_sizes(size, self.plan.num_microbatches)  # refuses before anything is sent
        loss_of = as_loss_fn(loss_fn, targets)

        def attempt() -> torch.Tensor:
            sizes = microbatch_sizes(size, self.plan.num_microbatches)
            turn = self._schedule(training=True, count=len(sizes), offset=0)
            mean = self._loss_reduction == "mean"
            step = Step(
                inputs=split_inputs(args, kwargs, sizes, self._batch_dim, self._whole_inputs),
                targets=split(targets, sizes, self._batch_dim),
                weights=[n / size if mean else 1.0 for n in sizes],
                routes=self.plan.routes,
                loss_fn=loss_of,
                key=SeedKey(self._seed, self._calls, 0),
                deadlines=turn.deadlines,
                header=f"train {signature(args, kwargs)}",
            )
            with torch.enable_grad(), self._seeded(), self._clocked("train"):
                self._state.check_trainable()
                return torch.tensor(self._executor.train(turn.actions, step), dtype=torch.float64)

        loss: torch.Tensor = self._call("train", attempt)
        return loss

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
        self._adapt("infer")
        size = batch_size(args, kwargs, self._batch_dim)

        def attempt() -> tuple[list[Any], list[int]]:
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
            with torch.no_grad(), self._seeded(), self._clocked("infer"):
                return self._executor.infer(turn.actions, step, self.output_ranks), sizes

        outputs, sizes = self._call("infer", attempt)
        return merge(outputs, sizes, self._batch_dim) if outputs else None

    generate = generation.generate

    def _adapt(self, kind: str) -> None:
        if not self._take_in(kind) and self._adapter is not None and self.calls:
            self._adapter.between_calls(self)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Counts the call and leaves the user's random generators as they were."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
        self._calls += 1

    @contextmanager
    def _clocked(self, kind: Literal["train", "infer"]) -> Iterator[None]:
        watch = self.watch
        if watch is not None:
            watch.began()
        start_s = time.perf_counter()
        yield
        self.calls.append(Call(kind, start_s, time.perf_counter()))
        if watch is not None:
            watch.ended(self.calls[-1], self._executor._mail.spans)

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
        self.close()
        raise error

    # ------------------------------------------------------------ measuring

    @property
    def codec_report(self) -> CodecReport:
        """Which codecs are on for training and for inference, which were refused, and why."""
        return self._executor.codec_report

    def computed(self) -> list[tuple[str, float]]:
        """Returns (action, seconds) of what this rank computed in the last call."""
        spans = self._executor._mail.spans
        return [(label, end - start) for lane, label, start, end in spans if lane == "compute"]

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
        gathered = self._call(
            "timeline", lambda: self._agreement.gather(json.dumps(mine).encode(), "timeline")
        )
        spans = [Span(**span) for part in gathered for span in json.loads(part)]
        return Timeline(source="measured", num_ranks=len(self.plan.devices), spans=tuple(spans))
