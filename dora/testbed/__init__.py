"""Emulates a cluster on this machine, with real processes, sockets and contention.

scale.py     how large the emulated cluster is; wiring.py  where a packet crosses which medium
netns.py     namespaces, bridges and queues; cgroup.py  speed and memory of devices
testbed.py   `Testbed`, all of these together; launch.py  a program on all devices, and churn
energy.py    joules from what was counted; names.py  what tells leftovers from what is in use
"""

from dora.testbed.energy import modelled_energy
from dora.testbed.launch import Event, Job, parse_event, rank_environment
from dora.testbed.scale import Scale
from dora.testbed.testbed import Testbed, TestbedError, remove_left_over, why_not

__all__ = [
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
