"""Joules of emulated devices, from what the operating system counted of them."""

from __future__ import annotations

from dora.simulator import device_j
from dora.spec import Activity, Cluster, Device, Energy, Usage


def modelled_energy(activity: Activity, cluster: Cluster) -> tuple[Energy, ...]:
    """Returns what devices with the cluster's powers take for the work that was counted."""
    return tuple(_energy(usage, cluster.device(usage.device)) for usage in activity.usage)


def _energy(usage: Usage, device: Device) -> Energy:
    joules = device_j(
        device,
        busy_s=usage.busy_s,
        total_s=usage.total_s,
        sent_bytes=usage.sent_bytes,
        received_bytes=usage.received_bytes,
    )
    return Energy(device=device.name, joules=joules, provenance="modelled from measured activity")
