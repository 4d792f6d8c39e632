"""Draws timelines and plans with matplotlib, which only the extra `report` brings.

::

    gantt_figure(timeline, plan, cluster).savefig("step.svg")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dora.errors import SpecError
from dora.report.flows import medium_rows
from dora.spec import Action, Cluster, Plan, Span, Timeline

# Dark enough on white, and apart for most colour-blind readers (Okabe and Ito, 2008).
_COLORS = {
    "F": "#0072B2",
    "B": "#D55E00",
    "REDUCE_GRAD": "#009E73",
    "input": "#E69F00",
    "other": "#999999",
}
_NAMES = {
    "F": "forward",
    "B": "backward",
    "SEND_F": "activations",
    "SEND_B": "gradients",
    "REDUCE_GRAD": "reduction",
    "input": "inputs",
    "other": "results and control",
}


def gantt_figure(timeline: Timeline, plan: Plan, cluster: Cluster) -> Any:
    """Returns a matplotlib Figure: a row per device that computes, and per medium that is used.

    A medium's row shows from when to when messages are under way on it; where several are, they
    share its rate or wait for each other.

    Args:
        timeline: Of that plan.
        plan: Its devices and routes.
        cluster: With the links between them.

    Raises:
        SpecError: matplotlib is not installed.
    """
    rows = [*_device_rows(timeline, plan), *medium_rows(timeline, plan, cluster)]
    names = list(dict.fromkeys(name for name, _, _ in rows))
    start_s = min((span.start_s for span in timeline.spans), default=0.0)
    figure, axes = _axes(height=1.6 + 0.35 * len(names))
    for name, kind, span in rows:
        position, length_ms = names.index(name), (span.end_s - span.start_s) * 1e3
        is_sent = kind not in ("F", "B")
        axes.broken_barh(
            [((span.start_s - start_s) * 1e3, length_ms)],
            (position - 0.4, 0.8),
            facecolors=_COLORS[kind.removeprefix("SEND_")],
            alpha=0.5 if is_sent else 0.9,
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds, {timeline.source}")
    _legend(axes, [kind for _, kind, _ in rows])
    return figure


def pareto_figure(plans: Sequence[Plan], single: Plan | None = None) -> Any:
    """Returns a matplotlib Figure of time against energy, with the number of each plan.

    Args:
        plans: With costs, best first, such as `SearchResult.plans`.
        single: The best plan on one device, to compare with.

    Raises:
        SpecError: matplotlib is not installed.
    """
    figure, axes = _axes(height=4.5)
    costs = [plan.cost for plan in plans if plan.cost is not None]
    axes.plot(
        [cost.makespan_s * 1e3 for cost in costs],
        [cost.energy_j for cost in costs],
        "o", color=_COLORS["F"], label="plans that none beats",
    )  # fmt: skip
    for i, cost in enumerate(costs):
        at = cost.makespan_s * 1e3, cost.energy_j
        axes.annotate(str(i + 1), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if single is not None and single.cost is not None:
        axes.plot(
            [single.cost.makespan_s * 1e3], [single.cost.energy_j],
            "s", mfc="none", ms=11, color=_COLORS["B"], label="best single device",
        )  # fmt: skip
    axes.set_xlabel("milliseconds, predicted")
    axes.set_ylabel("joules, modelled")
    axes.margins(0.15)
    axes.legend(frameon=False)
    return figure


def _axes(height: float) -> tuple[Any, Any]:
    try:
        # Without pyplot, which would look for a screen and keep every figure alive.
        from matplotlib.figure import Figure
    except ImportError:
        raise SpecError(
            "figures: matplotlib is not installed, allowed: after pip install "
            "'dora-parallel[report]'"
        ) from None
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _device_rows(timeline: Timeline, plan: Plan) -> Iterator[tuple[str, str, Span]]:
    for rank, name in enumerate(plan.devices):
        for span in timeline.spans:
            if span.rank == rank and span.lane == "compute":
                kind = Action.from_str(span.label).kind
                if kind in ("F", "B"):
                    yield name, kind, span


def _legend(axes: Any, kinds: Iterable[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=_COLORS[kind.removeprefix("SEND_")],
            alpha=0.9 if kind in ("F", "B") else 0.5,
            label=_NAMES[kind],
        )
        for kind in dict.fromkeys(kinds)
    ]
    axes.legend(handles=handles, ncols=len(handles), frameon=False, loc="lower left",
                bbox_to_anchor=(0, 1))  # fmt: skip
