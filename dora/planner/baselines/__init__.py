"""Rival planners, rebuilt from their papers, to compare Dora's plans with.

`BASELINES[name](profile, cluster, workload)` returns a plan without a cost, or raises
`InfeasiblePlanError` if that planner finds none. Each decides by its own cost and memory model,
which is all it knows: a plan of theirs may not fit a device, and says nothing about shared media.
Price them all with one predictor.

problem.py    what a rival is told, and how its answer becomes a `Plan`
simple.py     best-single, data-parallel, even-pipeline, memory-proportional
edgeshard.py  edgeshard-latency, edgeshard-throughput (arXiv 2405.14371)
asteroid.py   asteroid (arXiv 2408.08015)
pipeedge.py   pipeedge (arXiv 2110.14895)
alpa.py       alpa-like (arXiv 2201.12023)
metis.py      metis-like (USENIX ATC 2024)
prima.py      prima-like (arXiv 2504.08791)
parallax.py   parallax-like (arXiv 2509.26182)
"""

from __future__ import annotations

from collections.abc import Callable

from dora.planner.baselines.alpa import alpa_like
from dora.planner.baselines.asteroid import asteroid
from dora.planner.baselines.edgeshard import edgeshard_latency, edgeshard_throughput
from dora.planner.baselines.metis import metis_like
from dora.planner.baselines.parallax import parallax_like
from dora.planner.baselines.pipeedge import pipeedge
from dora.planner.baselines.prima import prima_like
from dora.planner.baselines.simple import (
    best_single,
    data_parallel,
    even_pipeline,
    memory_proportional,
)
from dora.spec import Cluster, ModelProfile, Plan, Workload

Baseline = Callable[[ModelProfile, Cluster, Workload], Plan]

BASELINES: dict[str, Baseline] = {
    "best-single": best_single,
    "data-parallel": data_parallel,
    "even-pipeline": even_pipeline,
    "memory-proportional": memory_proportional,
    "edgeshard-latency": edgeshard_latency,
    "edgeshard-throughput": edgeshard_throughput,
    "asteroid": asteroid,
    "pipeedge": pipeedge,
    "alpa-like": alpa_like,
    "metis-like": metis_like,
    "prima-like": prima_like,
    "parallax-like": parallax_like,
}

__all__ = ["BASELINES", "Baseline"]
