"""Finds the best plans over splits, subsets and orders of devices, replicas, windows and modes.

Two phases. First, chains of device groups are enumerated in the order of what they take at least
on a network where only the total load of each shared medium counts (`chains`). Then the promising
ones are played on the contended network, each transfer as urgent as its tail is long (`predict`),
and the best of them improved in small steps (`improve`).

The search ends when no chain is left whose bound is below the best plan, which proves that no other
chain is better, or when its effort is spent; `SearchResult.gap` bounds what is left to gain. Effort
is counted in played actions, not in seconds: the same input and seed give the same plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, log2
from typing import NamedTuple

from dora.errors import InfeasiblePlanError
from dora.planner.chains import Chain, Chains, twins
from dora.planner.codecs import CODECS
from dora.planner.cost import microbatch_size
from dora.planner.improve import descend, neighbours, resized
from dora.planner.layouts import costs_of, layouts
from dora.planner.limits import Limit, at_percentile, broken, limits
from dora.planner.predict import (
    Group,
    Layout,
    Setting,
    as_step,
    evaluate,
    is_linked,
    memory_share,
    setting,
)
from dora.planner.select import Candidate, best_single, kept, nearest_text, rejections, to_plans
from dora.scheduler import schedule_network
from dora.simulator import simulate
from dora.spec import BoundaryCodec, Cluster, ModelProfile, Plan, QoE, Workload

OBJECTIVES = ("time", "energy")
# Relative difference below which two predictions are equal.
TOLERANCE = 1e-9
# Chains of each number of micro-batches that are played before their bounds decide.
FIRST_WALKS = 12
# Chains at one depth are played at the other ones too if they are within this factor of the best.
DEPTH_FACTOR = 1.5
# Layouts that are improved, of different stages each.
NUM_STARTS = 6
# Share of the effort for chains, for improving, and for the other objective.
EFFORT_SHARES = (0.45, 0.35, 0.20)

# Times that the order of a plan's transfers is tried; the order by tails is rarely beaten.
NETWORK_PLAYS = 20

# Seconds that playing a layout takes on one core of a 2020s server, measured: 110 us in Python and
# 0.25 us per action.
CALL_S, ACTION_S = 110e-6, 0.25e-6


class SearchResult(NamedTuple):
    """Everything that a search found out.

    Attributes:
        plans: Within the QoE, none worse than another in time, energy and memory; best first.
        rejected: (candidate, reason), nearest first.
        best_single: Best plan on one device, even if it breaks the QoE; None if none has the
            memory for the model.
        problem: Why `plans` is empty, in one line; '' otherwise.
        is_optimal: No chain of groups at the windows and shares tried is better than the first.
        gap: What any other plan could still gain at most, as a share of the first one's value.
        num_placements: Chains of device groups that were bounded.
        num_evaluated: Layouts that were played.
    """

    plans: list[Plan]
    rejected: list[tuple[str, str]]
    best_single: Plan | None
    problem: str
    is_optimal: bool
    gap: float
    num_placements: int
    num_evaluated: int


def plan(
    profile: ModelProfile, cluster: Cluster, workload: Workload, qoe: QoE | None = None
) -> list[Plan]:
    """Returns the plans worth considering, best first, each with its predicted cost.

    ::

        best, *others = plan(profile, cluster, Workload(batch_size=32), QoE(step_s=0.5))

    Args:
        profile: With timings for every device; `dora.catalog.scale_profile` adds missing ones.
        cluster: Devices and links; any device may be left out of a plan.
        workload: Without `num_microbatches`, divisors of the batch are tried.
        qoe: Hard bounds and the objective; None minimises time.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
        InfeasiblePlanError: No plan meets the bounds; names the bound and the nearest plan.
    """
    result = search(profile, cluster, workload, qoe)
    if not result.plans:
        raise InfeasiblePlanError(result.problem)
    return result.plans


def search(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    qoe: QoE | None = None,
    *,
    effort_s: float | None = None,
    seed: int = 0,
) -> SearchResult:
    """Returns the plans as `plan` does, and what became of the other candidates.

    An unreachable QoE is no error here: `plans` is empty and `problem` says why.

    Args:
        profile: See `plan`.
        cluster: See `plan`.
        workload: See `plan`.
        qoe: See `plan`.
        effort_s: About the seconds to spend on playing layouts; None: 0.1 for each device.
        seed: Of the order in which changes are tried.

    Raises:
        ValueError: A timing is missing.
        SpecError: The QoE has a bound that can not be judged.
    """
    qoe = qoe or QoE()
    wanted = limits(workload, qoe)
    network = at_percentile(cluster, qoe.percentile) if qoe.percentile != 50 else cluster
    settings = [setting(profile, network, workload, m) for m in microbatch_choices(workload)]
    effort_s = 0.1 * len(cluster.devices) if effort_s is None else effort_s
    run = Search(settings, network, wanted, qoe.max_accuracy_loss, seed)
    run.walk_singles()
    other = "energy" if qoe.objective == "time" else "time"
    floor = run.walk_chains(qoe.objective, effort_s * EFFORT_SHARES[0])
    run.improve(qoe.objective, effort_s * EFFORT_SHARES[1])
    run.walk_chains(other, effort_s * EFFORT_SHARES[2] / 2)
    run.improve(other, effort_s * EFFORT_SHARES[2] / 2)
    return _result(run, qoe.objective, floor)


def _result(run: Search, objective: str, floor: float) -> SearchResult:
    network = run.cluster
    names = [device.name for device in network.devices]
    single = best_single(run.found, objective)
    chosen = kept(run.found, objective, single)
    problem = "" if chosen else nearest_text(run.found, run.wanted, run.unfit)
    best = chosen[0].value(objective) if chosen else inf
    plans = [
        scheduled(plan, candidate, network)
        for plan, candidate in zip(to_plans(chosen, names), chosen, strict=True)
    ]
    return SearchResult(
        plans=plans,
        rejected=rejections(run.found, chosen, run.unfit, run.unwalked, run.settings),
        best_single=to_plans([single], names)[0] if single else None,
        problem=problem,
        is_optimal=bool(chosen) and floor >= best * (1 - TOLERANCE),
        gap=max(0.0, 1 - floor / best) if chosen and best else 0.0,
        num_placements=run.num_chains,
        num_evaluated=len(run.seen),
    )


def scheduled(plan: Plan, candidate: Candidate, cluster: Cluster) -> Plan:
    """Returns a plan with its transfers in the order that the network scheduler found for them."""
    known = candidate.known
    if len(plan.stages) == 1 or known.decode is not None:
        return plan
    costs = costs_of(candidate.layout, known, plan)
    schedule = schedule_network(
        plan, costs, cluster, training=known.training, max_plays=NETWORK_PLAYS
    )
    timeline = simulate(plan, schedule, costs, cluster)
    assert plan.cost is not None
    better = {"makespan_s": timeline.makespan_s, "energy_j": timeline.energy_j}
    cost = plan.cost.model_copy(update=better)
    return plan.model_copy(update={"transfers": schedule.transfers, "cost": cost})


def microbatch_choices(workload: Workload) -> list[int]:
    """Returns the workload's number of micro-batches, or divisors of the batch near 1, 2, 4..64."""
    if workload.num_microbatches is not None:
        return [workload.num_microbatches]
    size = microbatch_size(workload, 1)
    most = 3 if workload.kind == "generate" else 6
    divisors = [m for m in range(1, min(size, 64) + 1) if size % m == 0]
    return sorted({max(m for m in divisors if m <= 2**power) for power in range(most + 1)})


class Search:
    """State of one search: what was found, and what was rejected without being played.

    Attributes:
        found: Every layout that was played and has the memory.
        seen: The same by layout; None where memory or a link is missing.
        unfit: Placement -> why it can not run.
        unwalked: Placement -> (least time, least energy) of those never played.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        cluster: Cluster,
        wanted: tuple[Limit, ...],
        max_loss: float,
        seed: int,
    ) -> None:
        """Starts with nothing found."""
        self.wanted, self.max_loss, self.seed = wanted, max_loss, seed
        self.cluster = cluster
        # A good plan, found early, cuts off most of the rest: it often has about two micro-batches
        # for each device.
        guess = 2 * min(len(settings[0].devices), 8)
        self.settings = sorted(settings, key=lambda k: abs(log2(k.num_microbatches / guess)))
        self.twin_of = twins(settings[0])
        self.found: list[Candidate] = []
        self.seen: dict[Layout, Candidate | None] = {}
        self.unfit: dict[tuple[tuple[int, ...], ...], str] = {}
        self.unwalked: dict[tuple[tuple[int, ...], ...], tuple[float, float]] = {}
        self.best = {"time": inf, "energy": inf}
        self.spent_s = 0.0
        self.num_chains = 0

    def walk_singles(self) -> None:
        """Plays every single device."""
        for known in self.settings:
            for d in range(len(known.devices)):
                groups = (Group(0, known.costs.num_blocks, (d,)),)
                for layout in layouts(groups, ((known.num_microbatches,),), known)[:1]:
                    self.play(layout, known)

    def play(self, layout: Layout, known: Setting) -> Candidate | None:
        """Returns a layout with its prediction, None if memory or a link is missing."""
        if layout in self.seen:
            return self.seen[layout]
        self.seen[layout] = None
        self.spent_s += CALL_S + ACTION_S * layout.num_microbatches * len(layout.groups) * 6
        placement = tuple(group.devices for group in layout.groups)
        step = as_step(layout, known, known.costs)
        share, text = memory_share(layout, known, step)
        if share > 1:
            self.unfit.setdefault(placement, text)
            return None
        if not is_linked(layout.groups, known):
            self.unfit.setdefault(placement, "no link between devices that exchange data")
            return None
        prediction = evaluate(layout, known, step)
        failed = broken(self.wanted, layout, prediction, known)
        candidate = Candidate(layout, prediction, known, failed, share)
        self.seen[layout] = candidate
        self.found.append(candidate)
        if not failed:
            for objective in OBJECTIVES:
                self.best[objective] = min(self.best[objective], candidate.value(objective))
        return candidate

    def walk_chains(self, objective: str, effort_s: float) -> float:
        """Plays chains in the order of their bounds, until none can be better or effort is spent.

        Returns:
            What no chain can beat: the least bound of those that were not played, or the best.
        """
        stop_s = self.spent_s + effort_s
        chains, floor = self._enumerate(objective, stop_s)
        for chain in chains:
            bound = chain.bound(objective)
            if bound >= self.best[objective] * (1 - TOLERANCE):
                break
            if self.spent_s > stop_s:
                floor = min(floor, bound)
                break
            self.walk(chain, objective)
        return min(floor, self.best[objective])

    def _enumerate(self, objective: str, stop_s: float) -> tuple[list[Chain], float]:
        """Returns chains by their bounds, and the least bound of those that were left out."""
        chains: list[Chain] = []
        width, per_state, num_settings = _width(len(self.settings[0].devices))
        # A sequence is one pass for the bounds, however its prompt is cut.
        settings = self.settings[:1] if self.settings[0].decode else self.settings
        spaces = [Chains(known, self.cluster, self.max_loss) for known in settings]
        dropped = min((space.least(objective) for space in spaces[num_settings:]), default=inf)
        for space in spaces[:num_settings]:
            cutoff_s, cutoff_j = self._cutoffs(objective)
            found, least = space.enumerate(
                objective, cutoff_s=cutoff_s, cutoff_j=cutoff_j, width=width, per_state=per_state
            )
            dropped = min(dropped, least)
            self.num_chains += len(found)
            for chain in found:
                self._remember(chain)
            for chain in found[:FIRST_WALKS]:
                if self.spent_s < stop_s:
                    self.walk(chain, objective)
            chains += found
        return sorted(chains, key=lambda c: c.bound(objective)), dropped

    def _cutoffs(self, objective: str) -> tuple[float, float]:
        """Returns what the bounds of a chain must be below to be of use."""
        cutoff = {"time": inf, "energy": inf}
        if isfinite(self.best[objective]):
            cutoff[objective] = self.best[objective] * (1 - TOLERANCE)
            for limit in self.wanted:
                if limit.field in ("latency_s", "step_s"):
                    cutoff["time"] = min(cutoff["time"], limit.allowed * (1 + TOLERANCE))
                if limit.field == "energy_j":
                    cutoff["energy"] = min(cutoff["energy"], limit.allowed * (1 + TOLERANCE))
        return cutoff["time"], cutoff["energy"]

    def _remember(self, chain: Chain) -> None:
        placement = tuple(group.devices for group in chain.groups)
        old_s, old_j = self.unwalked.get(placement, (inf, inf))
        self.unwalked[placement] = min(old_s, chain.bound_s), min(old_j, chain.bound_j)

    def walk(self, chain: Chain, objective: str) -> None:
        """Plays a chain at one depth, and at the others if it is near the best."""
        for known in self.settings if chain.known.decode else (chain.known,):
            made = self._variants(chain, known)
            first = self.play(made[min(1, len(made) - 1)], known)
            if first and first.value(objective) > DEPTH_FACTOR * self.best[objective]:
                continue
            for layout in made:
                self.play(layout, known)

    def _variants(self, chain: Chain, known: Setting) -> list[Layout]:
        counts = chain.counts
        if known is not chain.known:
            counts = tuple((known.num_microbatches,) for _ in chain.groups)
        made = layouts(chain.groups, counts, known)
        names = [name for name, codec in CODECS.items() if 0 < codec.error <= self.max_loss]
        if not names or len(chain.groups) < 2:
            return made
        name = min(names, key=lambda name: CODECS[name].bits)
        codec = BoundaryCodec(forward=name, backward=name if known.training else "none")
        return made + [one._replace(codecs=(codec,) * (len(chain.groups) - 1)) for one in made]

    def improve(self, objective: str, effort_s: float) -> None:
        """Descends from the best layouts of different stages, one after the other."""
        by_size = {known.num_microbatches: known for known in self.settings}
        starts = self._starts(objective)
        for i, start in enumerate(starts):
            stop_s = self.spent_s + effort_s / len(starts)

            def value_of(layout: Layout, stop_s: float = stop_s) -> float:
                if self.spent_s > stop_s:
                    return -inf
                known = by_size[layout.num_microbatches]
                return self._rank(self.play(layout, known), objective)

            def neighbours_of(layout: Layout) -> list[Layout]:
                known = by_size[layout.num_microbatches]
                found = neighbours(layout, known, self.twin_of, self.max_loss)
                others = [k for k in self.settings if k is not known]
                return found + [one for k in others for one in resized(layout, k)]

            descend(start.layout, value_of, neighbours_of, seed=self.seed + i)

    def _starts(self, objective: str) -> list[Candidate]:
        ranked = sorted(self.found, key=lambda c: self._rank(c, objective))
        starts: dict[tuple[tuple[int, ...], ...], Candidate] = {}
        for candidate in ranked:
            if len(starts) < NUM_STARTS:
                starts.setdefault(candidate.placement, candidate)
        return list(starts.values())

    def _rank(self, candidate: Candidate | None, objective: str) -> float:
        """Returns what to minimise: the objective, or how badly a limit is broken."""
        if candidate is None:
            return inf
        if candidate.failed:
            return 1e12 * max(limit.excess(value) for limit, value in candidate.failed)
        return candidate.value(objective)


def _width(num_devices: int) -> tuple[int, int, int]:
    """Returns how many chains to keep per block, of those that go on alike, and for how many M.

    Up to five devices nothing has to be cut off; of more, memory and time bound what is kept.
    """
    if num_devices <= 5:
        return 40_000, 40_000, 7
    return (600, 8, 7) if num_devices <= 8 else (100, 5, 3)
