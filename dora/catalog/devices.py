"""Devices of the catalogue as `Device` values; units and trust are in SOURCES.md."""

from __future__ import annotations

from dora.catalog import tables
from dora.catalog.networks import network
from dora.spec import Device


def device_names() -> tuple[str, ...]:
    """Returns the names that `device` knows, such as 'jetson-orin-nano-8gb-25w'."""
    return tuple(tables.by_name("devices.csv"))


def device(name: str) -> Device:
    """Returns the device of that catalogue name.

    Energy per byte is that of the network which the device has by default. `memory_bytes` is all
    of its memory; a process gets less, so override it for a phone or a busy machine.

    Raises:
        SpecError: Unknown name; the message lists the closest ones.
    """
    row = tables.find("device", name, tables.by_name("devices.csv"))
    extra = tables.by_name("devices_extra.csv")[name]
    radio = network(row["net_default"])
    return Device(
        name=name,
        kind=row["class"],
        flops_per_s=float(row["fp32_flops"]),
        mem_bandwidth_bytes_per_s=float(row["mem_bw_bytes_s"]),
        memory_bytes=int(row["mem_bytes"]),
        efficiency=float(extra["eff_fp32"]),
        mem_efficiency=float(extra["mem_bw_eff"]),
        thermal_factor=float(extra["thermal_sustained_factor"]),
        dispatch_s=float(extra["dispatch_overhead_us"]) * 1e-6,
        idle_w=float(row["idle_w"]),
        busy_w=float(row["load_w"]),
        tx_j_per_byte=radio.tx_j_per_byte,
        rx_j_per_byte=radio.rx_j_per_byte,
        battery_j=float(row["battery_wh"]) * 3600 if row["battery_wh"] else None,
    )
