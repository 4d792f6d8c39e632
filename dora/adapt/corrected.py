"""Forecasts that have seen what plans really take.

A mix keeps an average only as well as its plans' times are known, and predictions are some percent
off. So of each plan that runs the measured time over the predicted one is kept.
"""

from __future__ import annotations

from math import exp, log

from dora.adapt.forecast import Predictor
from dora.spec import Conditions, Forecast, Plan

# What is further off is a change of conditions that the estimates have not followed yet. One device
# of the testbed took 1.35 times what its profile said.
MOST = 2.0
# An exchange is about tens of calls, whose mean is steady.
_GAIN = 0.5
_TIMES = ("latency_s", "step_s", "deadline_s", "frame_rate_hz", "ttft_s", "tpot_s")


class Corrected:
    """A `Predictor` with a factor per plan.

    Args:
        predict: What it corrects.
    """

    def __init__(self, predict: Predictor) -> None:
        self._predict = predict
        self._logs: dict[int, tuple[Plan, float]] = {}  # by id, with what keeps the id its own
        self._is_time = [limit.field in _TIMES for limit in predict.limits]

    def observe(self, plan: Plan, time_s: float, conditions: Conditions) -> None:
        """Learns from the mean time of some calls."""
        found = self._predict(plan, conditions)
        if found is None or not found.time_s > 0 < time_s:
            return
        seen = min(max(log(time_s / found.time_s), -log(MOST)), log(MOST))
        _, before = self._logs.get(id(plan), (plan, seen))
        self._logs[id(plan)] = plan, before + _GAIN * (seen - before)

    def __call__(self, plan: Plan, conditions: Conditions) -> Forecast | None:
        """Returns the forecast; a plan that has not run is taken to be off by what others are."""
        found = self._predict(plan, conditions)
        if found is None or not self._logs:
            return found
        _, own = self._logs.get(id(plan), (plan, None))
        usual = sum(x for _, x in self._logs.values()) / len(self._logs)
        factor = exp(usual if own is None else own)
        pairs = zip(found.excess, self._is_time, strict=True)
        excess = tuple(e * factor if is_time else e for e, is_time in pairs)
        return found._replace(time_s=found.time_s * factor, excess=excess)
