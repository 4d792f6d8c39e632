"""Networks of the catalogue: what one crossing of them costs in time and energy.

The measured round trip is of a whole path, a `Medium` has the delay of one crossing, one way:

    Wi-Fi, BLE, Thread   RTT of the hop device <-> access point: RTT/2 per crossing; device to
                         device through the access point crosses twice, so RTT one way
    Ethernet             RTT device <-> switch <-> device: each way crosses two ports (up of one,
                         down of the other), so RTT/4 per crossing
    cellular, WAN        RTT device <-> server nearby: RTT/2 per crossing of the access link
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from dora.catalog import tables
from dora.spec import Medium

_CROSSINGS_PER_ROUND_TRIP = {"ethernet": 4}


class Network(NamedTuple):
    """One row of networks.csv in SI units.

    Attributes:
        rate_bytes_per_s: Median goodput of one flow alone, down for asymmetric kinds.
        up_rate_bytes_per_s: The same from the device to the network.
        latency_s: One-way delay of one crossing.
        contention: Total efficiency with 1, 2, ... concurrent flows.
        is_shared: All devices share one channel; otherwise each has a full-duplex port.
        spread: The rates that a tenth of the time are fallen below and exceeded, over the median.
    """

    name: str
    kind: str
    rate_bytes_per_s: float
    up_rate_bytes_per_s: float
    latency_s: float
    contention: tuple[float, ...]
    is_shared: bool
    tx_j_per_byte: float
    rx_j_per_byte: float
    spread: tuple[float, float] = (1.0, 1.0)


def network_names() -> tuple[str, ...]:
    """Returns the names that `network` and `medium` know, such as 'wifi6_80_2ss'."""
    return tuple(tables.by_name("networks.csv"))


def network(name: str) -> Network:
    """Returns the network of that catalogue name; SpecError lists the closest ones."""
    row = tables.find("network", name, tables.by_name("networks.csv"))
    crossings = _CROSSINGS_PER_ROUND_TRIP.get(row["kind"], 2)
    return Network(
        name=name,
        kind=row["kind"],
        rate_bytes_per_s=float(row["goodput_mbps_p50"]) * 1e6 / 8,
        up_rate_bytes_per_s=float(row["uplink_mbps_p50"]) * 1e6 / 8,
        latency_s=float(row["rtt_ms_p50"]) * 1e-3 / crossings,
        contention=wifi_contention() if row["kind"] == "wifi" else (1.0,),
        is_shared=row["shared_medium"] == "1",
        tx_j_per_byte=float(row["tx_nj_per_bit"]) * 8e-9,
        rx_j_per_byte=float(row["rx_nj_per_bit"]) * 8e-9,
        spread=_spread(row),
    )


def _spread(row: Mapping[str, str]) -> tuple[float, float]:
    median = float(row["goodput_mbps_p50"])
    low = float(row["goodput_mbps_p10"] or median) / median
    return min(low, 1.0), max(float(row["goodput_mbps_p90"] or median) / median, 1.0)


def medium(name: str, network_name: str) -> Medium:
    """Returns a medium called `name` at the median rate of a catalogue network.

    Of a wired network it is one direction of one port; of an asymmetric one, the direction down.
    """
    return as_medium(name, network(network_name))


def as_medium(name: str, known: Network, *, up: bool = False) -> Medium:
    """Returns one direction of a network as a medium called `name`."""
    rate = known.up_rate_bytes_per_s if up else known.rate_bytes_per_s
    low, high = known.spread
    return Medium(
        name=name,
        rate_bytes_per_s=rate,
        latency_s=known.latency_s,
        contention=known.contention,
        rate_p10_bytes_per_s=rate * low if low < 1 else None,
        rate_p90_bytes_per_s=rate * high if high > 1 else None,
    )


@cache
def wifi_contention() -> tuple[float, ...]:
    """Returns total Wi-Fi efficiency for 1, 2, ... 32 flows, linear between the rows.

    The DCF column: home access points rarely schedule uplink OFDMA, and it is the worse case.
    """
    points = [
        (int(row["k_flows"]), float(row["eta_dcf_ampdu4ms"]))
        for row in tables.rows("wifi_contention.csv")
    ]
    between = [
        a + (b - a) * (k - k_a) / (k_b - k_a)
        for (k_a, a), (k_b, b) in pairwise(points)
        for k in range(k_a, k_b)
    ]
    return tuple(round(eta, 6) for eta in [*between, points[-1][1]])
