"""What a schedule does over time, predicted or measured, and how to look at it.

trace.py   Timeline -> trace file for ui.perfetto.dev, and -> text
"""

from dora.simulator.trace import format_timeline, to_trace

__all__ = ["format_timeline", "to_trace"]
