"""Figures of plans and timelines; needs the extra `report`.

figures.py   gantt_figure: devices and media over time; pareto_figure: time against energy
"""

from dora.report.figures import gantt_figure, pareto_figure

__all__ = ["gantt_figure", "pareto_figure"]
