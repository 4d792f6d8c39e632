"""Turns a QoE into limits that a prediction keeps or breaks."""

from __future__ import annotations

from typing import NamedTuple

from dora.errors import SpecError
from dora.planner.predict import Layout, Prediction, Setting
from dora.spec import QoE, Workload

_LATER = ("deadline_s", "ttft_s", "tpot_s")
_UNITS = {"s": "s", "j": "J", "w": "W", "hz": "Hz"}


class Limit(NamedTuple):
    """One hard bound of a QoE; `field` is its name there."""

    field: str
    allowed: float

    def excess(self, value: float) -> float:
        """Returns value / allowed, or the inverse where more is better; above 1 breaks it."""
        if self.field == "frame_rate_hz":
            return self.allowed / value
        return value / self.allowed

    def __str__(self) -> str:
        """Returns for example 'step_s <= 0.5 s'."""
        sign = ">=" if self.field == "frame_rate_hz" else "<="
        return f"{self.field} {sign} {self.allowed:g} {_UNITS[self.field.rsplit('_', 1)[1]]}"


def limits(workload: Workload, qoe: QoE) -> tuple[Limit, ...]:
    """Returns the bounds of `qoe`.

    Raises:
        SpecError: A bound that this version can not judge for such a workload.
    """
    if workload.kind == "generate":
        raise SpecError("workload.kind: given 'generate', allowed: 'train' or 'infer'")
    other = "latency_s" if workload.kind == "train" else "step_s"
    for field in (*_LATER, other):
        if getattr(qoe, field) is not None:
            right = "step_s" if workload.kind == "train" else "latency_s"
            raise SpecError(
                f"qoe.{field}: can not be judged for kind = '{workload.kind}', allowed: {right}"
            )
    if qoe.percentile != 50:
        raise SpecError(f"qoe.percentile: given {qoe.percentile:g}, allowed: 50 in this version")
    fields = ("latency_s", "step_s", "frame_rate_hz", "energy_j", "power_w", "battery_j")
    given = ((field, getattr(qoe, field)) for field in fields)
    return tuple(Limit(field, value) for field, value in given if value is not None)


def measure(field: str, layout: Layout, prediction: Prediction, known: Setting) -> float:
    """Returns what a layout is predicted to reach for a bound of that name."""
    if field == "frame_rate_hz":
        return 1 / prediction.interval_s if prediction.interval_s else float("inf")
    if field == "energy_j":
        return prediction.total_j
    if field == "power_w":
        return prediction.total_j / prediction.makespan_s if prediction.makespan_s else 0.0
    if field == "battery_j":
        pairs = zip(layout.devices, prediction.energy_j, strict=True)
        return sum(e for d, e in pairs if known.devices[d].battery_j is not None)
    return prediction.makespan_s


def broken(
    wanted: tuple[Limit, ...], layout: Layout, prediction: Prediction, known: Setting
) -> tuple[tuple[Limit, float], ...]:
    """Returns each limit that is broken with the value that breaks it, worst first."""
    values = [(limit, measure(limit.field, layout, prediction, known)) for limit in wanted]
    # Predictions are sums in some order: the last bits decide nothing.
    found = [(limit, value) for limit, value in values if limit.excess(value) > 1 + 1e-9]
    return tuple(sorted(found, key=lambda pair: -pair[0].excess(pair[1])))
