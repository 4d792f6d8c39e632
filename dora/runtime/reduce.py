"""Sums gradients over the ranks that hold the same parameter, while backward still runs.

Replicas of a stage hold the same parameters, and so do stages that share a tied weight. Every
micro-batch passes one replica per stage with its share of the loss, so the plain sum over all
holders is the gradient of the whole batch. A stage with a codec sums codes, see `coded_sum.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora.kernels import Format
from dora.runtime.coded_sum import CodedSum
from dora.runtime.compress import DTYPES, FORMATS, MIN_BYTES
from dora.runtime.priority import GRADIENT
from dora.runtime.tags import reduce_tag
from dora.runtime.transport import Pending, Transport

# Large enough for the link's rate, small enough that the first bucket leaves early.
BUCKET_BYTES = 4 * 2**20


@dataclass
class _Bucket:
    """Parameters reduced by one message, plus one flag each: does it have a gradient."""

    ranks: tuple[int, ...]
    parameters: list[nn.Parameter]
    first_use: int = 0  # position of its earliest parameter in the model
    missing: int = 0
    flat: torch.Tensor | None = None
    pending: Pending | None = None
    coded: CodedSum | None = None
    error: torch.Tensor | None = None  # what its codes have lost so far


@dataclass
class GradReducer:
    """Buckets of shared parameters of one rank.

    Attributes:
        holders: For each local parameter name, the ranks that hold it, ascending.
        rank: This one.
        stages: Rank -> its stage.
        codecs: Of each stage, () for none; change them between steps, alike on all ranks.
    """

    transport: Transport
    parameters: Mapping[str, nn.Parameter]
    holders: Mapping[str, tuple[int, ...]]
    rank: int = 0
    stages: Mapping[int, int] = field(default_factory=dict)
    codecs: tuple[str, ...] = ()
    _step: int = 0
    _buckets: list[_Bucket] = field(default_factory=list)
    _prior: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    _armed: bool = False
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._buckets = _make_buckets(self.parameters, self.holders)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = parameter.register_post_accumulate_grad_hook(self._ready_hook(bucket))
                self._hooks.append(hook)

    def close(self) -> None:
        """Leaves the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Sets gradients of earlier steps aside, since those are summed over ranks already."""
        self._prior = {}
        self._step += 1
        for bucket in self._buckets:
            bucket.missing, bucket.flat = len(bucket.parameters), None
            bucket.pending, bucket.coded = None, None
            for parameter in bucket.parameters:
                if parameter.grad is not None:
                    self._prior[parameter] = parameter.grad
                    parameter.grad = None

    def arm(self) -> None:
        """Call before the last backward: from now on a full bucket leaves at once."""
        self._armed = True

    def flush(self) -> None:
        """Starts the reduction of all buckets that have not left yet."""
        self._armed = False
        for bucket in self._buckets:
            self._start(bucket)

    def finish(self, timeout_s: float) -> None:
        """Waits for all buckets and puts the sums into `grad`, on top of earlier steps'."""
        self.flush()
        for bucket in self._buckets:
            if bucket.coded is not None:
                bucket.coded.pass_on(timeout_s)
        for bucket in self._buckets:
            assert bucket.pending is not None and bucket.flat is not None
            bucket.pending.wait(timeout_s)
            _unpack(bucket)
            bucket.flat, bucket.pending, bucket.coded = None, None, None
        for parameter, grad in self._prior.items():
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        self._prior = {}

    def forget(self) -> None:
        """Drops what codes have lost so far, as after a change of codecs."""
        for bucket in self._buckets:
            bucket.error = None

    def _ready_hook(self, bucket: _Bucket):  # type: ignore[no-untyped-def]
        def ready(parameter: torch.Tensor) -> None:
            if self._armed:
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._start_in_order(bucket)

        return ready

    def _start_in_order(self, full: _Bucket) -> None:
        """Starts full buckets of one group in list order, the same order on all its ranks."""
        for bucket in self._buckets:
            if bucket.ranks == full.ranks:
                if bucket.missing > 0:
                    return
                self._start(bucket)

    def _start(self, bucket: _Bucket) -> None:
        if bucket.pending is None:
            bucket.flat = _pack(bucket.parameters)
            # The next forward pass needs the first layers first.
            priority = GRADIENT._replace(deadline=bucket.first_use)
            format = self._format(bucket)
            if format is not None:
                bucket.pending = bucket.coded = self._coded_sum(bucket, bucket.flat, format)
                return
            bucket.pending = self.transport.all_reduce(
                bucket.flat, bucket.ranks, "REDUCE_GRAD", priority=priority
            )

    def _format(self, bucket: _Bucket) -> Format | None:
        """Returns how a bucket travels: by the codec of its stages, if they have the same one."""
        names = {self.codecs[self.stages[rank]] for rank in bucket.ranks} if self.codecs else set()
        if len(names) != 1 or "none" in names or _size(bucket.parameters) < MIN_BYTES:
            return None
        # Parameters of other dtypes have no codes.
        return FORMATS[names.pop()] if bucket.parameters[0].dtype in DTYPES else None

    def _coded_sum(self, bucket: _Bucket, flat: torch.Tensor, format: Format) -> CodedSum:
        num_flags = len(bucket.parameters)
        vector, flags = flat[:-num_flags], flat[-num_flags:]
        if bucket.error is None:
            bucket.error = torch.zeros(vector.numel())
        return CodedSum(
            self.transport,
            bucket.ranks,
            self.rank,
            vector,
            flags,
            error=bucket.error,
            format=format,
            seed=zlib.crc32(f"{self._step} {self.rank} {bucket.first_use}".encode()),
            tag=reduce_tag(bucket.first_use),
            priority=GRADIENT._replace(deadline=bucket.first_use),
        )


def _make_buckets(
    parameters: Mapping[str, nn.Parameter], holders: Mapping[str, tuple[int, ...]]
) -> list[_Bucket]:
    """Groups shared parameters by holders and dtype, last ones first as backward reaches them.

    The order and content depend on names, sizes and holders alone: equal on all holders.
    """
    buckets: list[_Bucket] = []
    open_buckets: dict[tuple[object, ...], _Bucket] = {}
    order = {name: i for i, name in enumerate(holders)}
    for name in sorted(parameters, key=lambda name: order[name], reverse=True):
        parameter, ranks = parameters[name], holders[name]
        if len(ranks) < 2 or not parameter.requires_grad:
            continue
        key = (ranks, parameter.dtype)
        bucket = open_buckets.get(key)
        if bucket is None or _size(bucket.parameters) + _size([parameter]) > BUCKET_BYTES:
            bucket = open_buckets[key] = _Bucket(ranks, [])
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        bucket.first_use = order[name]
    return buckets


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _pack(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Returns gradients and has-a-gradient flags as one CPU vector."""
    parts = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).detach().reshape(-1)
        for p in parameters
    ]
    flags = torch.tensor([p.grad is not None for p in parameters], dtype=parameters[0].dtype)
    return torch.cat([*(part.cpu() for part in parts), flags])


def _unpack(bucket: _Bucket) -> None:
    assert bucket.flat is not None
    sizes = [p.numel() for p in bucket.parameters]
    *grads, flags = bucket.flat.split([*sizes, len(sizes)])
    for parameter, grad, flag in zip(bucket.parameters, grads, flags.tolist(), strict=True):
        parameter.grad = grad.view_as(parameter).to(parameter.device) if flag else None
