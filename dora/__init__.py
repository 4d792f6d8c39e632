"""Dora spreads one PyTorch model over the unlike devices that you already own.

Data flows one way; each arrow is a function between types of `dora.spec`:

    nn.Module + sample       --profiler-->   ModelProfile
    ModelProfile + Cluster   --planner-->    [Plan]
    Plan                     --scheduler-->  Schedule
    Schedule                 --simulator-->  Timeline (predicted)
    Schedule                 --runtime-->    outputs + Timeline (measured)

spec/         the vocabulary: devices, profiles, plans, actions, timelines
files.py      reads and writes it; one-line errors
catalog/      devices, networks, models and scenarios by name; roofline times without a device
partition/    nn.Module -> chain of blocks
profiler/     measures blocks and links
planner/      which blocks on which devices; what other planners would choose
scheduler/    what each rank does in which order, and how the network treats every transfer
simulator/    plays a schedule on a contended network; traces of rates, speeds and churn
kernels/      tensors as int8, int4 or fp8 and back, in torch, C++ and Triton
runtime/      DoraParallel: training, inference, generation, going on without a device; the
              torch.distributed backend "dora"
adapter/      when to go over to which plan, from what was observed; adapt/ joins it with the rest
_C            in C++, from csrc/: the communication engine, the simulation, the search over chains
keys.py       where the job's secret comes from
live/         what a running job says of itself, to files and to Prometheus; top.py shows it
search.py     profile + plan in one call, for DoraParallel's `plan`
compare.py    Dora beside other planners, all played alike; judge.py the true cost of any plan
report/       a run as one HTML page; figures: Gantt per device and medium, Pareto front
testbed/      a whole cluster on this machine: namespaces, queues, control groups, churn
cli.py        the command `dora`; cli_plan.py plan, simulate and compare, cli_network.py doctor and
              keys, cli_testbed.py, cli_report.py, cli_top.py, console.py what they print with,
              views.py tables, doctor.py, peercheck.py and factory.py the questions they ask
demo/         what `dora demo` trains, measures and shows
"""

import logging

from dora.catalog import load_cluster
from dora.errors import DoraError, InfeasiblePlanError, PeerLostError
from dora.files import load, save
from dora.partition import partition
from dora.runtime.parallel import DoraParallel
from dora.runtime.process_group import register as register_backend
from dora.search import planned
from dora.spec import Cluster, Plan, QoE, Workload

__version__ = "0.1.0"
__all__ = [
    "Cluster",
    "DoraError",
    "DoraParallel",
    "InfeasiblePlanError",
    "PeerLostError",
    "Plan",
    "QoE",
    "Workload",
    "load",
    "load_cluster",
    "partition",
    "planned",
    "register_backend",
    "save",
]

logging.getLogger("dora").addHandler(logging.NullHandler())
