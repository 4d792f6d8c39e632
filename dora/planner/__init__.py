"""Chooses which devices run which blocks, with which shares and how many in flight.

Start with `plan(profile, cluster, workload, qoe) -> list[Plan]`; `search` also says what was
rejected and why.

search.py    plan, search: branch and bound over splits, subsets, orders and replicas
splits.py    the splits of one order of groups, best bound first
bounds.py    what no split of an order of device groups can beat, by dynamic programming
predict.py   predict: exact time, energy and memory of one placement
makespan.py  walks the forwards and backwards of a pipeline in their order
cost.py      seconds, bytes and shares of stages and links from the profile
limits.py    the bounds of a QoE and what a prediction reaches
select.py    the plans that none beats, and why the others were rejected
"""

from dora.planner.predict import predict
from dora.planner.search import SearchResult, plan, search

__all__ = ["SearchResult", "plan", "predict", "search"]
