"""Chooses which devices run which blocks, with which shares and how many in flight.

Start with `plan(profile, cluster, workload, qoe) -> list[Plan]`; `search` also says what was
rejected and why.

search.py    plan, search: chains by their bounds, then played, then improved
chains.py    phase one: chains of device groups, best bound first (csrc/chains)
improve.py   phase two: small changes of a layout, and descent along those that help
predict.py   evaluate: time, energy and memory of one layout on the contended network
layouts.py   from placements to layouts, plans and step costs; predict: a plan with its cost
cost.py      seconds, bytes and shares of stages and links from the profile
codecs.py    what a codec saves on the wire, costs in time, and loses
recode.py    recoded: the codecs of a placement that is given
limits.py    the bounds of a QoE, percentiles, and what a prediction reaches
select.py    the plans that none beats, and why the others were rejected
baselines/   what other planners would choose, written from their papers
"""

from dora.planner.layouts import predict, step_costs
from dora.planner.recode import recoded
from dora.planner.search import SearchResult, plan, search

__all__ = ["SearchResult", "plan", "predict", "recoded", "search", "step_costs"]
