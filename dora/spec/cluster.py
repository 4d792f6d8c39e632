"""Devices and the network between them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dora.spec.base import (
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Spec,
    check,
    check_unique,
)


class PowerMode(Spec):
    """A setting that scales a device's speed and its busy power, 1.0 being the default mode."""

    name: Name
    speed_factor: Positive = 1.0
    power_factor: Positive = 1.0


class Device(Spec):
    """One machine; time of an operation is max(flops, bytes) at sustained rates + dispatch.

    Attributes:
        flops_per_s: Peak dense fp32 rate of the processor that runs the model.
        efficiency: Sustained share of `flops_per_s` for large dense layers.
        mem_efficiency: Sustained share of `mem_bandwidth_bytes_per_s`.
        thermal_factor: Share of the compute rate that is left after minutes of full load.
        dispatch_s: Overhead of launching one operation.
        idle_w: Whole-device power while waiting.
        busy_w: Whole-device power under full load.
        battery_j: Energy in the battery; None means mains power.
    """

    name: Name
    kind: str = "generic"
    flops_per_s: Positive
    mem_bandwidth_bytes_per_s: Positive
    memory_bytes: Count
    efficiency: Fraction = 0.5
    mem_efficiency: Fraction = 0.7
    thermal_factor: Fraction = 1.0
    dispatch_s: NonNegative = 0.0
    idle_w: NonNegative = 0.0
    busy_w: NonNegative = 0.0
    tx_j_per_byte: NonNegative = 0.0
    rx_j_per_byte: NonNegative = 0.0
    battery_j: Positive | None = None
    power_modes: tuple[PowerMode, ...] = ()

    def power_mode(self, name: str) -> PowerMode:
        """Returns the mode of that name; 'default' always exists."""
        for mode in self.power_modes:
            if mode.name == name:
                return mode
        check(name == "default", f"{self.name} has no power mode {name!r}")
        return PowerMode(name="default")


class Medium(Spec):
    """Something that carries one transfer's bytes at a time: a Wi-Fi channel, a switch port.

    Attributes:
        rate_bytes_per_s: Goodput of one flow alone.
        latency_s: One-way delay that crossing it once adds.
        contention: Total efficiency with 1, 2, ... concurrent flows; the last value extends.
        rate_p10_bytes_per_s, rate_p90_bytes_per_s: Where the rate varies over time: it is below
            the one, and above the other, a tenth of the time; `rate_bytes_per_s` is the median.
    """

    name: Name
    rate_bytes_per_s: Positive
    latency_s: NonNegative = 0.0
    contention: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (1.0,)
    rate_p10_bytes_per_s: Positive | None = None
    rate_p90_bytes_per_s: Positive | None = None

    @model_validator(mode="after")
    def _quantiles_ascend(self) -> Medium:
        low = self.rate_p10_bytes_per_s or self.rate_bytes_per_s
        high = self.rate_p90_bytes_per_s or self.rate_bytes_per_s
        check(
            low <= self.rate_bytes_per_s <= high,
            f"medium {self.name}: rates must ascend from p10 to the median to p90",
        )
        return self


class Link(Spec):
    """The media that a flow from `src` to `dst` crosses, with multiplicity.

    A flow from device to access point to device on one channel names that medium twice.
    """

    src: Name
    dst: Name
    media: Annotated[tuple[Name, ...], Field(min_length=1)]


class Cluster(Spec):
    """Devices in rank order, the media between them, and one directed link per pair."""

    name: str = "cluster"
    devices: Annotated[tuple[Device, ...], Field(min_length=1)]
    media: tuple[Medium, ...] = ()
    links: tuple[Link, ...] = ()

    @model_validator(mode="after")
    def _names_resolve(self) -> Cluster:
        check_unique("device", [d.name for d in self.devices])
        check_unique("medium", [m.name for m in self.media])
        check_unique("link", [f"{link.src} -> {link.dst}" for link in self.links])
        devices, media = {d.name for d in self.devices}, {m.name for m in self.media}
        for link in self.links:
            check(link.src != link.dst, f"link {link.src} -> {link.dst} needs two devices")
            for name in (link.src, link.dst):
                check(name in devices, f"link names unknown device {name!r}")
            for name in link.media:
                check(name in media, f"link {link.src} -> {link.dst}: unknown medium {name!r}")
        return self

    def device(self, name: str) -> Device:
        """Returns the device of that name; ValueError lists the known ones."""
        for device in self.devices:
            if device.name == name:
                return device
        raise ValueError(f"unknown device {name!r}, known: {[d.name for d in self.devices]}")

    def path(self, src: str, dst: str) -> tuple[float, float] | None:
        """Returns (bytes per second, seconds of latency) of an uncontended link, None if absent.

        A medium crossed k times gives each crossing 1/k of its rate.
        """
        media = {medium.name: medium for medium in self.media}
        for link in self.links:
            if (link.src, link.dst) == (src, dst):
                crossed = [media[name] for name in link.media]
                rate = min(m.rate_bytes_per_s / link.media.count(m.name) for m in crossed)
                return rate, sum(m.latency_s for m in crossed)
        return None
