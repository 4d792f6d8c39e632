"""What the engine's statistics of links say about the media of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any

from dora.spec import Cluster, Conditions, Plan, Predict

# An estimate is the largest of samples of 40 ms (csrc/rate.h), and bursts that are shorter show
# less than a link can do. So a lane counts that was busy for two samples and for a tenth of the
# time; one that was not holds up little. At a quarter, a pipeline of two on the testbed, whose
# lanes were busy for 23 %, knew nothing of its medium until that had slowed down.
BUSY_S = 0.08
BUSY_SHARE = 0.1
# Processes add to a round trip; where the network's own part is not larger, it is not seen.
LEAST_ROUND_TRIP_S = 1e-3
# Predictions are some percent off, so that calls say nothing of rates unless they are that much
# shorter than those explain, or longer: the testbed's longest 5 % take 1.3 times the prediction.
DOUBT, LONG = 1.15, 1.3
# Of a rate; less than that share of it is another failure. A range of a thousand, halved so often,
# is known to 6 %.
LEAST_SHARE, _HALVINGS = 1 / 32, 7


class LinkGauges:
    """What the engine knows of the links of this rank.

    Args:
        num_ranks: Of the job.
    """

    def __init__(self, num_ranks: int) -> None:
        self._sent_bytes = [0.0] * num_ranks
        self._at_s = -inf

    def read(self, transport: Any, at_s: float) -> tuple[list[float], list[float]]:
        """Returns (bytes per second, seconds of a round trip) by rank of the peer; 0 is unknown.

        Args:
            transport: Of the model; one without an engine knows nothing.
            at_s: Now; rates are about what was sent since the last time.
        """
        rates, trips = ([0.0] * len(self._sent_bytes) for _ in range(2))
        communicator = getattr(transport, "communicator", None)
        peers = communicator.engine.stats()["peers"] if communicator is not None else {}
        least_s = max(BUSY_S, BUSY_SHARE * (at_s - self._at_s))
        for peer, stats in peers.items():
            rate, sent_bytes = stats["rate_bytes_per_s"], float(stats["bytes_sent"])
            if rate and (sent_bytes - self._sent_bytes[peer]) / rate >= least_s:
                rates[peer] = rate
            self._sent_bytes[peer] = sent_bytes
            trips[peer] = stats["rtt_s"] or 0.0
        self._at_s = at_s
        return rates, trips


class Paths:
    """Which medium limits, and which delays, the way from one rank to another."""

    def __init__(self, cluster: Cluster) -> None:
        media = {medium.name: medium for medium in cluster.media}
        ranks = {device.name: rank for rank, device in enumerate(cluster.devices)}
        self._narrowest: dict[tuple[int, int], tuple[str, float]] = {}
        self._slowest: dict[tuple[int, int], tuple[str, float]] = {}
        for link in cluster.links:
            way = ranks[link.src], ranks[link.dst]
            shares = {m: media[m].rate_bytes_per_s / link.media.count(m) for m in link.media}
            narrowest = min(shares, key=lambda name: shares[name])
            self._narrowest[way] = narrowest, shares[narrowest]
            slowest = max(link.media, key=lambda name: media[name].latency_s)
            self._slowest[way] = slowest, 2 * sum(media[m].latency_s for m in link.media)

    def rates(self, rates_bytes_per_s: Mapping[int, Sequence[float]]) -> dict[str, float]:
        """Returns what each medium carries over its rate: the most that any path over it shows.

        The most, because paths that are busy at the same time show their shares.
        """
        found: dict[str, float] = {}
        for src, row in rates_bytes_per_s.items():
            for dst, rate in enumerate(row):
                if rate > 0 and (src, dst) in self._narrowest:
                    name, given = self._narrowest[src, dst]
                    found[name] = max(found.get(name, 0.0), rate / given)
        return found

    def delays(self, round_trips_s: Mapping[int, Sequence[float]]) -> dict[str, float]:
        """Returns the delay of each medium over the given one: the least that any path shows."""
        found: dict[str, float] = {}
        for src, row in round_trips_s.items():
            for dst, trip_s in enumerate(row):
                name, given_s = self._slowest.get((src, dst), ("", 0.0))
                if trip_s > 0 and given_s >= LEAST_ROUND_TRIP_S:
                    found[name] = min(found.get(name, trip_s / given_s), trip_s / given_s)
        return found


def believable(
    rates: Mapping[str, float],
    speeds: Mapping[str, float],
    plan: Plan,
    predict: Predict,
    call_s: float,
) -> dict[str, float]:
    """Returns the rates of media that explain how long calls take, where the given ones do not.

    Where several devices send all the time, each path shows its share of the medium alone: on the
    testbed 0.31 of the rate in a pipeline of three, whose steps took half of what that explains.
    Among other traffic it is the other way round: the best that a path has shown lately holds for
    half a minute (csrc/rate.h), while calls already take twice as long.

    Args:
        rates: Of media, over those of the cluster.
        speeds: Of devices, likewise.
        plan: What has run.
        predict: What plans take.
        call_s: What a call of it took.
    """

    def moved(factor: float) -> dict[str, float]:
        if factor < 1:
            return {name: rate * factor for name, rate in rates.items()}
        return {name: max(rate, min(rate * factor, 1.0)) for name, rate in rates.items()}

    def time_s(factor: float) -> float:
        found = predict(plan, Conditions.of({**speeds, **moved(factor)}))
        return found.time_s if found is not None else 0.0

    expected_s = time_s(1.0)
    if not rates or not call_s or not expected_s:
        return dict(rates)
    if expected_s > DOUBT * call_s:
        far = max(1 / max(min(rates.values()), 1e-3), 1.0)
    elif call_s > LONG * expected_s and time_s(LEAST_SHARE) > call_s:
        far = LEAST_SHARE
    else:
        return dict(rates)
    near = 1.0
    for _ in range(_HALVINGS):
        middle = sqrt(near * far)
        is_short = (time_s(middle) > call_s) == (expected_s > call_s)
        near, far = (middle, far) if is_short else (near, middle)
    return moved(far)
