"""Joules of one device from what it did: computing, waiting and its radio."""

from __future__ import annotations

from dora.spec import Device


def device_j(
    device: Device,
    *,
    busy_s: float,
    total_s: float,
    sent_bytes: float,
    received_bytes: float,
    power_factor: float = 1.0,
) -> float:
    """Returns the modelled energy of a device that takes part for `total_s`.

    A waiting device is not free: boards log 13 to 33 % of full power while they stall, so that
    most of the energy of a badly balanced pipeline is spent waiting.

    Args:
        device: Its powers and its energy per byte.
        busy_s: Computing; it waits for the rest of `total_s`.
        total_s: Of the step or request.
        sent_bytes: By its radio or port.
        received_bytes: The same.
        power_factor: Of its power mode, on what computing adds to idling.
    """
    busy_w = device.idle_w + (device.busy_w - device.idle_w) * power_factor
    radio_j = sent_bytes * device.tx_j_per_byte + received_bytes * device.rx_j_per_byte
    return busy_s * busy_w + (total_s - busy_s) * device.idle_w + radio_j
