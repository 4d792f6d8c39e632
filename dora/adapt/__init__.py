"""Joins the adapter with planner and simulator: forecasts, a bank of plans, and runs in a trace.

forecast.py  Predictor: what a plan takes under conditions; pricer: what a switch costs
bank.py      make_bank: plans to choose from; plans_for: those of one world
world.py     segments: a trace as stretches of constant conditions
tally.py     Tally: counts items that pass through them
machine.py   Machine: runs plans through a trace; Residence: which blocks lie where
play.py      play_adapter: the policy in a trace
rivals.py    best_static, play_replanning, play_oracle: what it is compared with
hook.py      adapting: the policy in a running job, for `DoraParallel`
gauges.py    what the engine's statistics say about media
"""

from dora.adapt.bank import make_bank, plans_for
from dora.adapt.forecast import Predictor, block_bytes, pricer, under
from dora.adapt.hook import Adapting, adapting
from dora.adapt.play import Played, play_adapter
from dora.adapt.rivals import best_static, play_oracle, play_replanning, play_static
from dora.adapt.tally import Totals
from dora.adapt.world import Segment, merged, segments

__all__ = [
    "Adapting",
    "Played",
    "Predictor",
    "Segment",
    "Totals",
    "adapting",
    "best_static",
    "block_bytes",
    "make_bank",
    "merged",
    "plans_for",
    "play_adapter",
    "play_oracle",
    "play_replanning",
    "play_static",
    "pricer",
    "segments",
    "under",
]
