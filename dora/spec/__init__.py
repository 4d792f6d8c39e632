"""The vocabulary of Dora: every value that one part hands to another.

All types are frozen pydantic models (or named tuples) in SI units: `_s` seconds, `_bytes`,
`_j` joules, `_w` watts, `_bytes_per_s`. Times and energies are floats, bytes are ints.
This package imports neither torch nor anything of dora; `dora/files.py` reads and writes files.

cluster.py   PowerMode, Device, Medium, Link, Cluster
profile.py   Timing, BlockCost, BlockProfile, TiedParameter, CodecRate, Overhead, ModelProfile,
             Workload, QoE
plan.py      Replica, Stage, BoundaryCodec, DeviceMemory, Cost, Plan, routes_from_shares, warmup_for
schedule.py  Action, Transfer, Schedule
timeline.py  Span, Energy, Timeline
decision.py  Conditions, Forecast, Move, Migration, SwitchCost, Decision
run.py       Usage, Traffic, Activity, Run
status.py    LinkStatus, Happening, Shares, TokenStatus, Status
"""

from dora.spec.base import SCHEMA_VERSION, Spec
from dora.spec.cluster import Cluster, Device, Link, Medium, PowerMode
from dora.spec.decision import (
    Conditions,
    Decision,
    Forecast,
    Migration,
    Move,
    Predict,
    SwitchCost,
)
from dora.spec.plan import (
    BoundaryCodec,
    Cost,
    DeviceMemory,
    Plan,
    Replica,
    Stage,
    routes_from_shares,
    warmup_for,
)
from dora.spec.profile import (
    BlockCost,
    BlockProfile,
    CodecRate,
    ModelProfile,
    Overhead,
    QoE,
    TiedParameter,
    Timing,
    Workload,
)
from dora.spec.run import Activity, Run, Traffic, Usage
from dora.spec.schedule import ACTION_KINDS, Action, Schedule, Transfer
from dora.spec.status import Happening, LinkStatus, Shares, Status, TokenStatus
from dora.spec.timeline import Energy, Span, Timeline

__all__ = [
    "ACTION_KINDS",
    "Action",
    "Activity",
    "BlockCost",
    "BlockProfile",
    "BoundaryCodec",
    "Cluster",
    "CodecRate",
    "Conditions",
    "Cost",
    "Decision",
    "Device",
    "DeviceMemory",
    "Energy",
    "Forecast",
    "Happening",
    "Link",
    "LinkStatus",
    "Medium",
    "Migration",
    "ModelProfile",
    "Move",
    "Overhead",
    "Plan",
    "PowerMode",
    "Predict",
    "QoE",
    "Replica",
    "Run",
    "SCHEMA_VERSION",
    "Schedule",
    "Shares",
    "Span",
    "Spec",
    "Stage",
    "Status",
    "SwitchCost",
    "TiedParameter",
    "Timeline",
    "Timing",
    "TokenStatus",
    "Traffic",
    "Transfer",
    "Usage",
    "Workload",
    "routes_from_shares",
    "warmup_for",
]
