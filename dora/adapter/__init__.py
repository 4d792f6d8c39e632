"""Holds the quality of experience while rates, speeds and devices change. Pure of any runtime.

A loop that runs a model uses four things, in this order::

    monitor = Monitor([m.name for m in cluster.media], plan.devices)   # once
    standing = Standing((plan,))
    ...
    monitor.rate("wifi", measured_bytes_per_s / medium.rate_bytes_per_s, now_s)   # as they come
    monitor.step(predicted, measured, now_s)
    monitor.alive(device, now_s)                     # heartbeats; late(now_s) names who is missing
    ...
    view = monitor.view(now_s)
    decision, standing, forecast = decide(bank, standing, view, predict, price, rules)

Between steps, `decision.kind` says what to do:

    keep         nothing
    reschedule   order the same plan's transfers anew, at the estimated rates
    shift        `decision.plans[0]` has other shares on the same placement: no weights move
    switch       go over to `decision.plans[0]`
    mix          take `decision.plans` in turn: `next_turn(counts, decision.weights)`
    replan       nothing but what `is_replanning` says

With any kind, `decision.is_replanning` asks for a search in the background whose plans are added to
the bank, and `decision.prepare` names plans whose weights should be brought into place at the
lowest priority. A device that fails is told to the monitor (`lost`), and the next decision is about
the others. The two functions that `decide` needs come from outside, so that nothing of the planner
is imported here; `dora.adapt` has both::

    predict(plan, conditions) -> Forecast | None     Predictor(profile, cluster, workload, qoe)
    price(running, plan, conditions) -> SwitchCost   pricer(predict, held)

To switch, `migration(held, plan, block_bytes, cluster)` says which block goes from which device to
which, `remaining` what is left of that after a break, and `Migration.lost` what has to come from a
snapshot; `held` is device -> blocks whose weights it has. `relabelled` lets equal devices change
roles first, so that less has to move. A migration of weights that training changes at every step
has to end in a pause (`is_live`); that of serving needs a barrier only.

estimate.py  Tracker: level, noise, trend and jumps of one quantity
arrivals.py  Arrivals: how late is too late
monitor.py   Monitor -> View
score.py     what a plan is worth under uncertain conditions
shares.py    reshared: shares that follow the speeds
rules.py     Rules, Standing: how the policy weighs, and what it remembers
policy.py    decide: View, Standing, bank -> Decision
switch.py    best_switch: what each gains and costs, and which one pays most
mixing.py    mix: the part of it for averages and percentiles
compose.py   compose: mixes by a linear program; next_turn, turns, phases: how to take turns
migrate.py   migration: moves from one placement to another; twins, relabelled, remaining
events.py    event: what was decided and why, as JSON
"""

from dora.adapter.arrivals import Arrivals
from dora.adapter.compose import Memory, Mix, Toll, compose, next_turn, phases, turns
from dora.adapter.estimate import Estimate, Tracker
from dora.adapter.events import Event, event
from dora.adapter.migrate import (
    migration,
    placed,
    relabelled,
    remaining,
    switch_cost,
    twins,
)
from dora.adapter.monitor import Monitor, View, speeds
from dora.adapter.policy import Outcome, decide
from dora.adapter.rules import Rules, Standing
from dora.adapter.shares import reshared

__all__ = [
    "Arrivals",
    "Estimate",
    "Event",
    "Memory",
    "Mix",
    "Monitor",
    "Outcome",
    "Rules",
    "Standing",
    "Toll",
    "Tracker",
    "View",
    "compose",
    "decide",
    "event",
    "migration",
    "next_turn",
    "phases",
    "placed",
    "relabelled",
    "remaining",
    "reshared",
    "speeds",
    "switch_cost",
    "turns",
    "twins",
]
