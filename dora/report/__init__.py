"""Shows plans, timelines and whole runs: figures, which need the extra `report`, and a page.

figures.py    gantt_figure: devices and media over time; pareto_figure: time against energy
page.py       page: a Run -> one HTML page that loads nothing; its head, verdict and foot
sections.py   its sections: front, timelines and figures, links, energy, quality of experience
cluster.py    plan.py  gantt.py  charts.py   its drawings
facts.py      traffic.py   its numbers
flows.py      what a span is, and which media a message crosses
markup.py     quantities.py  style.py   escaped HTML and SVG, numbers with units, the style sheet
"""

from dora.report.figures import gantt_figure, pareto_figure
from dora.report.page import page

__all__ = ["gantt_figure", "page", "pareto_figure"]
