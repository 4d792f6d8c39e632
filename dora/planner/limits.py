"""Turns a QoE into limits that a prediction keeps or breaks."""

from __future__ import annotations

from math import inf
from statistics import NormalDist
from typing import NamedTuple

from dora.errors import SpecError
from dora.planner.codecs import loss
from dora.planner.predict import Layout, Prediction, Setting
from dora.spec import Cluster, Medium, QoE, Workload

_UNITS = {"s": "s", "j": "J", "w": "W", "hz": "Hz", "loss": ""}
# Bounds that each kind of workload can be judged by, beside those of power and energy.
_TIMES = {
    "train": ("step_s",),
    "infer": ("latency_s", "frame_rate_hz"),
    "generate": ("latency_s", "frame_rate_hz", "ttft_s", "tpot_s"),
}
_ALL_TIMES = ("latency_s", "step_s", "deadline_s", "frame_rate_hz", "ttft_s", "tpot_s")


class Limit(NamedTuple):
    """One hard bound of a QoE; `field` is its name there."""

    field: str
    allowed: float

    def excess(self, value: float) -> float:
        """Returns value / allowed, or the inverse where more is better; above 1 breaks it."""
        if self.field == "frame_rate_hz":
            return self.allowed / value
        return value / self.allowed if self.allowed else (1.0 if value <= 0 else inf)

    def __str__(self) -> str:
        """Returns for example 'step_s <= 0.5 s'."""
        sign = ">=" if self.field == "frame_rate_hz" else "<="
        unit = _UNITS[self.field.rsplit("_", 1)[1]]
        return f"{self.field} {sign} {self.allowed:g} {unit}".rstrip()


def limits(workload: Workload, qoe: QoE) -> tuple[Limit, ...]:
    """Returns the bounds of `qoe`.

    Raises:
        SpecError: A bound that can not be judged for such a workload.
    """
    right = _TIMES[workload.kind]
    for field in _ALL_TIMES:
        if getattr(qoe, field) is not None and field not in right:
            raise SpecError(
                f"qoe.{field}: can not be judged for kind = '{workload.kind}', allowed: "
                + ", ".join(right)
            )
    fields = (*right, "energy_j", "power_w", "battery_j")
    given = [(field, getattr(qoe, field)) for field in fields]
    found = [Limit(field, value) for field, value in given if value is not None]
    return (*found, Limit("max_accuracy_loss", qoe.max_accuracy_loss))


def at_percentile(cluster: Cluster, percentile: float) -> Cluster:
    """Returns the cluster with every medium as slow as it is for that share of requests.

    Time falls as rates rise, so on one medium the p-th percentile of a plan's time is its time at
    the (100 - p)-th percentile of the rate. Of several media that do not vary together this is an
    upper bound.
    """
    media = tuple(
        m.model_copy(
            update={
                "rate_bytes_per_s": rate_at(m, 1 - percentile / 100),
                "rate_p10_bytes_per_s": None,
                "rate_p90_bytes_per_s": None,
            }
        )
        for m in cluster.media
    )
    return cluster.model_copy(update={"media": media})


def rate_at(medium: Medium, share: float) -> float:
    """Returns the rate that a medium falls below for that share of the time.

    Log-normal through the median and p10 below it, or p90 above it.
    """
    z = NormalDist().inv_cdf(share) / NormalDist().inv_cdf(0.9)
    end = medium.rate_p10_bytes_per_s if z < 0 else medium.rate_p90_bytes_per_s
    ratio = (end or medium.rate_bytes_per_s) / medium.rate_bytes_per_s
    return float(medium.rate_bytes_per_s * ratio ** abs(z))


def measure(field: str, layout: Layout, prediction: Prediction, known: Setting) -> float:
    """Returns what a layout is predicted to reach for a bound of that name."""
    makespan_s, interval_s = prediction.makespan_s, prediction.interval_s
    batteries = (
        joules
        for d, joules in zip(layout.devices, prediction.energy_j, strict=True)
        if known.devices[d].battery_j is not None
    )
    reached = {
        "frame_rate_hz": 1 / interval_s if interval_s else inf,
        "energy_j": prediction.total_j,
        "power_w": prediction.total_j / makespan_s if makespan_s else 0.0,
        "battery_j": sum(batteries),
        "max_accuracy_loss": loss(layout.codecs, layout.gradient_codecs),
        "ttft_s": prediction.ttft_s,
        "tpot_s": prediction.tpot_s,
    }
    return reached.get(field, makespan_s)


def broken(
    wanted: tuple[Limit, ...], layout: Layout, prediction: Prediction, known: Setting
) -> tuple[tuple[Limit, float], ...]:
    """Returns each limit that is broken with the value that breaks it, worst first."""
    values = [(limit, measure(limit.field, layout, prediction, known)) for limit in wanted]
    # Predictions are sums in some order: the last bits decide nothing.
    found = [(limit, value) for limit, value in values if limit.excess(value) > 1 + 1e-9]
    return tuple(sorted(found, key=lambda pair: -pair[0].excess(pair[1])))
