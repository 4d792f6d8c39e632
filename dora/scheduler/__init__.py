"""From a plan to what every rank does in which order.

pipeline.py   build_schedule: GPipe, 1F1B and the inference wavefront as lists of Actions
validate.py   validate: right actions, no deadlock, memory bounds; peaks and a text grid
"""

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
    "format_grid",
    "in_flight_bounds",
    "microbatches_of",
    "peak_in_flight",
    "peak_receives",
    "validate",
]
