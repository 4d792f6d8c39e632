"""A run as it happened: what was planned, what was measured, what every device and medium did."""

from __future__ import annotations

from pydantic import model_validator

from dora.spec.base import Bytes, Name, NonNegative, Positive, Spec, check
from dora.spec.cluster import Cluster
from dora.spec.plan import Plan
from dora.spec.profile import QoE, Workload
from dora.spec.timeline import Timeline


class Usage(Spec):
    """What one device did for `total_s`, as the operating system counted it.

    Attributes:
        busy_s: Seconds of computing at the device's full speed.
        sent_bytes, received_bytes: On its network interface.
        peak_bytes: The most memory that it held.
    """

    device: Name
    total_s: NonNegative
    busy_s: NonNegative
    sent_bytes: Bytes = 0
    received_bytes: Bytes = 0
    peak_bytes: Bytes = 0


class Traffic(Spec):
    """What one medium carried: `carried_bytes[i]` in all until `at_s[i]`, both ascending."""

    medium: Name
    rate_bytes_per_s: Positive
    at_s: tuple[NonNegative, ...] = ()
    carried_bytes: tuple[Bytes, ...] = ()

    @model_validator(mode="after")
    def _samples_pair(self) -> Traffic:
        check(len(self.at_s) == len(self.carried_bytes), "at_s and carried_bytes must pair")
        check(list(self.at_s) == sorted(self.at_s), "at_s must ascend")
        check(list(self.carried_bytes) == sorted(self.carried_bytes), "carried_bytes must ascend")
        return self


class Activity(Spec):
    """What all devices and media did in one stretch of time, counted from outside the program."""

    usage: tuple[Usage, ...]
    traffic: tuple[Traffic, ...] = ()


class Run(Spec):
    """What `dora report` shows: predicted and measured, side by side.

    Attributes:
        cluster: As it was, scaled where it was emulated.
        front: The plans that the planner kept, the one that ran among them.
        predicted, measured: One step or request; energy and memory in them, where known.
        times_s: Of every measured step or request.
        window_s: From the first of these to the end of the last, on the machine's monotonic clock.
        activity: In that window; None where nobody counted.
        note: How it ran, such as 'emulated on one machine, 1/50 as fast'.
    """

    name: str = "run"
    cluster: Cluster
    workload: Workload
    qoe: QoE = QoE()
    plan: Plan
    front: tuple[Plan, ...] = ()
    predicted: Timeline | None = None
    measured: Timeline
    times_s: tuple[Positive, ...] = ()
    window_s: tuple[float, float] | None = None
    activity: Activity | None = None
    note: str = ""
