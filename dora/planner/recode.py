"""Chooses the codecs of a placement that is given, such as one that was written by hand."""

from __future__ import annotations

from collections.abc import Callable

from dora.planner.codecs import CODECS
from dora.planner.improve import codec_changes, descend
from dora.planner.layouts import cost, layout_of
from dora.planner.predict import Layout, Setting, evaluate, setting
from dora.spec import Cluster, ModelProfile, Plan, Workload

# Of the time: what a codec has to save to be taken in place of a better one. Measured rates of
# int8 and fp8, which have equal codes, differ by less from one profile to the next.
_WORTH = 0.005


def recoded(
    profile: ModelProfile, cluster: Cluster, workload: Workload, plan: Plan, max_loss: float
) -> Plan:
    """Returns a plan with the codecs that make it fastest, and its cost with them.

    Of choices that take about as long, the one that loses least is taken. Transfers in an order
    made for other sizes are dropped.

    Args:
        profile: See `search`.
        cluster: See `search`.
        workload: See `search`.
        plan: The placement; what codecs it has do not count.
        max_loss: See `QoE.max_accuracy_loss`.

    Raises:
        ValueError: The plan is for other devices, or a timing is missing.
    """
    known = setting(profile, cluster, workload, plan.num_microbatches)
    bare = layout_of(plan, known)._replace(codecs=(), gradient_codecs=())

    def time_s(layout: Layout) -> float:
        return evaluate(layout, known).makespan_s

    fastest = descend(
        bare,
        time_s,
        lambda layout: list(codec_changes(layout, known, max_loss)),
        lambda _, move: move if isinstance(move, Layout) else None,
    )
    limit_s = time_s(fastest) * (1 + _WORTH)
    best = _gentlest(fastest, known, max_loss, lambda layout: time_s(layout) <= limit_s)
    has_codecs = _lost(best) > 0
    return plan.model_copy(
        update={
            "codecs": best.codecs if has_codecs else (),
            "gradient_codecs": best.gradient_codecs,
            "max_accuracy_loss": max_loss if has_codecs else None,
            "transfers": (),
            "cost": cost(best, evaluate(best, known), known),
        }
    )


def _gentlest(
    layout: Layout, known: Setting, max_loss: float, is_fast: Callable[[Layout], bool]
) -> Layout:
    """Returns a layout with better codecs, one after the other, as long as it is fast."""
    while True:
        options = [
            one
            for one in codec_changes(layout, known, max_loss)
            if _lost(one) < _lost(layout) and is_fast(one)
        ]
        if not options:
            return layout
        layout = min(options, key=_lost)


def _lost(layout: Layout) -> float:
    """Returns the accuracy loss of all codecs together."""
    pairs = sum(CODECS[c.forward].loss + CODECS[c.backward].gradient_loss for c in layout.codecs)
    return pairs + sum(CODECS[name].gradient_loss for name in layout.gradient_codecs)
