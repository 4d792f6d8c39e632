"""From a plan to what every rank does in which order.

pipeline.py   build_schedule: GPipe, 1F1B and the inference wavefront as lists of Actions
network.py    schedule_network: priority and chunks of every transfer
bound.py      lower_bound_s: what no order of the transfers can beat
deadlines.py  deadlines: the order in which messages leave, as decided or by their consumers
validate.py   validate: right actions, no deadlock, memory bounds; peaks and a text grid
"""

from dora.scheduler.bound import lower_bound_s
from dora.scheduler.deadlines import consumer_starts, deadlines
from dora.scheduler.network import schedule_network
from dora.scheduler.pipeline import DEFAULT_PREFETCH, SCHEDULES, build_schedule, microbatches_of
from dora.scheduler.validate import (
    format_grid,
    in_flight_bounds,
    peak_in_flight,
    peak_receives,
    validate,
)

__all__ = [
    "DEFAULT_PREFETCH",
    "SCHEDULES",
    "build_schedule",
    "consumer_starts",
    "deadlines",
    "format_grid",
    "in_flight_bounds",
    "lower_bound_s",
    "microbatches_of",
    "peak_in_flight",
    "peak_receives",
    "schedule_network",
    "validate",
]
