"""What can be had without seeing the future, where one generated rate is all that varies.

The chooser here knows the rate of the second before exactly, and the law by which the next one is
drawn. A policy has to estimate both. What the oracle is ahead of it is what seeing the next second
is worth, which no policy can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt
from statistics import NormalDist

from adapter_traces import LTE_CORRELATION, LTE_CV

from dora.adapt import Predictor, Segment, Totals
from dora.adapt.machine import Machine
from dora.adapt.tally import late_share_at
from dora.adapter import Rules
from dora.adapter.migrate import BARRIER_S
from dora.adapter.score import unit_of
from dora.spec import Conditions, Plan

# Equally likely values of the next rate that a choice is weighed by.
NUM_DRAWS = 41
# Steps of the logarithm of a rate in which choices are remembered.
GRAIN = 0.05


def varying(parts: Sequence[Segment]) -> str | None:
    """Returns the name of what varies, None if that is more than one."""
    names = {name for part in parts for name, _ in part.conditions.factors}
    return names.pop() if len(names) == 1 else None


def play_informed(
    predict: Predictor, bank: Sequence[Plan], parts: Sequence[Segment], rules: Rules, name: str
) -> Totals:
    """Returns what choosing the plan of least expected cost for each second makes of a trace.

    All weights are in place: for serving.
    """
    unit = unit_of({id(plan): predict(plan, Conditions()) for plan in bank}, rules.objective)
    sigma = sqrt(log(1 + LTE_CV**2))
    rest = sigma * sqrt(1 - LTE_CORRELATION**2)
    quantiles = NormalDist().quantiles(n=NUM_DRAWS + 1)
    chosen: dict[int, Plan] = {}

    def choice(factor: float) -> Plan:
        cell = round(log(factor) / GRAIN)
        if cell not in chosen:
            middle = LTE_CORRELATION * cell * GRAIN
            ahead = [
                Conditions.of({name: exp(middle + rest * quantiles[k])}) for k in range(NUM_DRAWS)
            ]
            chosen[cell] = min(
                bank, key=lambda p: sum(_cost(predict, p, c, rules, unit) for c in ahead)
            )
        return chosen[cell]

    current, factor = choice(1.0), 1.0
    machine = Machine(predict, current, period_s=rules.period_s, pause_of=lambda _, __: BARRIER_S)
    for part in parts:
        plan = choice(factor)
        if plan is not current:
            machine.switch((plan,))
            current = plan
        machine.work(part)
        factor = dict(part.conditions.factors)[name]
    return machine.totals()


def _cost(predict: Predictor, plan: Plan, world: Conditions, rules: Rules, unit: float) -> float:
    """Returns what an item costs, as the policy counts it."""
    found = predict(plan, world)
    if found is None:
        return 10 * rules.penalty
    return found.value(rules.objective) / unit + rules.penalty * late_share_at(found.worst)
