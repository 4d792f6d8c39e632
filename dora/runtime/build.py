"""Puts together what runs this rank's stage."""

from __future__ import annotations

from dora.partition import Chain
from dora.runtime.agreement import Agreement
from dora.runtime.batchnorm import BatchNormSync
from dora.runtime.guard import GuardedExecutor
from dora.runtime.reduce import GradReducer
from dora.runtime.stage import StageRunner
from dora.runtime.state import ModelState, local_modules
from dora.runtime.transport import Transport
from dora.spec import Plan


def build_executor(
    chain: Chain,
    plan: Plan,
    rank: int,
    transport: Transport,
    *,
    state: ModelState,
    agreement: Agreement,
    activation_checkpointing: bool,
    timeout_s: float,
) -> GuardedExecutor:
    """Returns the executor of this rank; one that the plan leaves out gets the first stage's.

    Args:
        chain: The partitioned module.
        plan: The placement.
        rank: This process.
        transport: Carries all messages.
        state: Parameters and buffers of this rank.
        agreement: Of all ranks.
        activation_checkpointing: Recompute blocks in backward.
        timeout_s: Limit of every single wait.
    """
    placed = plan.placement(rank)
    stage = plan.stages[placed[0] if placed else 0]
    runner = StageRunner(
        chain, stage.first_block, stage.last_block, checkpoint=activation_checkpointing
    )
    replicas = plan.ranks(stage.index)
    modules = local_modules(chain, runner.units) if placed and len(replicas) > 1 else []
    return GuardedExecutor(
        plan,
        rank,
        runner,
        transport,
        reducer=GradReducer(
            transport,
            state.parameters,
            state.holders,
            rank=rank,
            stages={r: s.index for s in plan.stages for r in plan.ranks(s.index)},
            codecs=plan.gradient_codecs,
        ),
        batchnorm=BatchNormSync(modules, transport, replicas) if modules else None,
        timeout_s=timeout_s,
        state=state,
        agreement=agreement,
    )
