"""Writes numbers with units, to about three digits."""

from __future__ import annotations

import math
from collections.abc import Iterator

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))


def digits(value: float) -> str:
    """Returns about three digits, without an exponent."""
    size = abs(value)
    if size == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(size)))
    shown = f"{value:.{places}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def with_unit(value: float, unit: str, least: float = 1e-6) -> str:
    """Returns for example '1.41 kJ'; prefixes below `least` are not used."""
    for prefix, factor in _PREFIXES:
        # 999.7 would be written as 1000.
        if abs(value) >= factor * 0.9995 or factor <= least:
            return f"{digits(value / factor)} {prefix}{unit}"
    raise AssertionError("the last prefix is at most `least`")


def seconds(value: float) -> str:
    """Returns a duration: '830 µs', '12.4 ms', '1.73 s', '12.5 min'."""
    if value >= 600:
        return f"{digits(value / 60)} min"
    return f"{digits(value)} s" if value >= 0.9995 or not value else with_unit(value, "s")


def num_bytes(value: float) -> str:
    """Returns a size: '3.2 GB'."""
    return with_unit(value, "B", least=1.0)


def rate(bytes_per_s: float) -> str:
    """Returns the rate of a network, in bits: '433 Mbit/s'."""
    return with_unit(bytes_per_s * 8, "bit/s", least=1e3)


def joules(value: float) -> str:
    """Returns an energy: '12.6 J'."""
    return with_unit(value, "J", least=1e-3)


def percent(share: float) -> str:
    """Returns a share: '97%', '0.4%'."""
    size = abs(share) * 100
    return f"{share * 100:.0f}%" if size >= 9.95 or size < 0.05 else f"{share * 100:.1f}%"


def ordinal(level: float) -> str:
    """Returns the name of a percentile: 'median', '90th percentile'."""
    if level == 50:
        return "median"
    ends = {1: "st", 2: "nd", 3: "rd"}
    is_plain = level != int(level) or 10 < level < 14
    return f"{level:g}{'th' if is_plain else ends.get(int(level) % 10, 'th')} percentile"


def signed(share: float) -> str:
    """Returns a deviation: '+2.8%'."""
    shown = percent(abs(share))
    return shown if shown == "0%" else f"{'-' if share < 0 else '+'}{shown}"


def ticks(end: float, most: int, start: float = 0.0) -> list[float]:
    """Returns round numbers from `start` to `end`, `most` + 1 of them at the most."""
    if end <= start:
        return [start]
    power = 10.0 ** math.floor(math.log10((end - start) / most))
    step = next(power * m for m in (1, 2, 5, 10, 20) if (end - start) / (power * m) <= most)
    first, last = math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(end: float, start: float) -> list[float]:
    """Returns 1, 2, 5 times powers of ten, or those powers alone where these would be many."""
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    return [m * 10.0**p for p in powers for m in steps if start <= m * 10.0**p <= end]


def tick_labels(values: list[float], unit: str) -> Iterator[str]:
    """Yields the labels of an axis, all with the prefix that suits the last value."""
    last = values[-1] if values else 0.0
    prefix, factor = next(
        (pair for pair in _PREFIXES if last >= pair[1] * 0.9995), _PREFIXES[-1]
    )  # fmt: skip
    for value in values:
        yield f"{value / factor:g}" + (f" {prefix}{unit}" if value == last else "")
