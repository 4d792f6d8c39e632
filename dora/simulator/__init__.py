"""What a schedule does over time, predicted or measured, and how to look at it.

engine.py    simulate: plan, schedule, costs and cluster -> Timeline; StepCosts, network_of
dynamics.py  Dynamics: rates, speeds and churn over time, from files or generated
energy.py    device_j: joules of one device
trace.py     Timeline -> trace file for ui.perfetto.dev, and -> text
"""

from dora.simulator.dynamics import Dynamics, load_dynamics, wandering
from dora.simulator.energy import device_j
from dora.simulator.engine import (
    Compiled,
    StepCosts,
    compile_step,
    memory_over_time,
    network_of,
    simulate,
)
from dora.simulator.trace import format_timeline, to_trace, to_traces

__all__ = [
    "Compiled",
    "Dynamics",
    "StepCosts",
    "compile_step",
    "device_j",
    "format_timeline",
    "load_dynamics",
    "memory_over_time",
    "network_of",
    "simulate",
    "to_trace",
    "to_traces",
    "wandering",
]
