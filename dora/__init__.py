"""Dora spreads one PyTorch model over the unlike devices that you already own.

Data flows one way; each arrow is a function between types of `dora.spec`:

    nn.Module + sample       --profiler-->   ModelProfile
    ModelProfile + Cluster   --planner-->    [Plan]
    Plan                     --scheduler-->  Schedule
    Schedule                 --runtime-->    outputs + Timeline (measured)

spec/         the vocabulary: devices, profiles, plans, actions, timelines
files.py      reads and writes it; one-line errors
catalog/      devices and networks by name; roofline times for devices not at hand
partition/    nn.Module -> chain of blocks
profiler/     measures blocks and links
planner/      which blocks on which devices
scheduler/    what each rank does in which order
runtime/      DoraParallel: training and inference over torch.distributed
search.py     profile + plan in one call, for DoraParallel's `plan`
simulator/    timelines as Perfetto traces and text
cli.py        the command `dora`; views.py its tables, doctor.py and factory.py its questions
demo/         what `dora demo` trains, measures and shows
"""

import logging

from dora.catalog import load_cluster
from dora.errors import DoraError, InfeasiblePlanError, PeerLostError
from dora.files import load, save
from dora.partition import partition
from dora.runtime.parallel import DoraParallel
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
    "save",
]

logging.getLogger("dora").addHandler(logging.NullHandler())
