"""Emulates a cluster on this machine, with real processes, sockets and contention.

scale.py     how large the emulated cluster is; wiring.py  where a packet crosses which medium
namespaces.py  devices by the kernel: netns.py  namespaces, bridges and queues; cgroup.py  speed and
             memory of devices
rootless.py  devices without root: bucket.py  media that the engine keeps to; duty.py  speed
testbed.py   `Testbed`, either of the two; launch.py  a program on all devices, and churn
energy.py    joules from what was counted; names.py  what tells leftovers from what is in use
process.py   processes that die with the testbed
"""

from dora.testbed.energy import modelled_energy
from dora.testbed.launch import Event, Job, parse_event, rank_environment
from dora.testbed.namespaces import why_not
from dora.testbed.scale import Scale
from dora.testbed.testbed import MODES, Testbed, TestbedError, remove_left_over

__all__ = [
    "MODES",
    "Event",
    "Job",
    "Scale",
    "Testbed",
    "TestbedError",
    "modelled_energy",
    "parse_event",
    "rank_environment",
    "remove_left_over",
    "why_not",
]
