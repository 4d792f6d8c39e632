"""A time that no order of transfers can beat, to hold the network scheduler's result against.

Everything is a node of a graph: computes, which each rank runs in a given order, and transfers. A
head is the earliest a node can start, a tail the least that remains after it ends. Both start as
longest paths and are raised by what media must have carried in between: whatever precedes a node on
one medium passes it one after the other. A linear program (HiGHS) then puts all media together, by
mean busy times: of a set S of transfers on a medium, whatever their order and however they are cut,

    sum over S of q M  >=  q(S) (least head in S + q(S) / 2)

where q is how long a transfer occupies the medium, and the same backwards from the end. See
Goemans, Queyranne, Schulz, Skutella and Wang, Single machine scheduling with release dates, SIAM
Journal on Discrete Mathematics 2002.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dora.simulator import StepCosts
from dora.spec import Action, Cluster, Plan, Schedule

# Thresholds of head and of tail that the sets of the linear program are made of.
_NUM_THRESHOLDS = 10


class Node(NamedTuple):
    """A compute or a transfer.

    Attributes:
        duration_s: Without contention, until what waits for it can start.
        before: Nodes that must have ended.
        uses: (medium, seconds that it occupies it).
    """

    duration_s: float
    before: tuple[int, ...]
    uses: tuple[tuple[str, float], ...] = ()


def lower_bound_s(plan: Plan, schedule: Schedule, costs: StepCosts, cluster: Cluster) -> float:
    """Returns seconds below which no order of the transfers can end the schedule.

    Args:
        plan: Routes and devices.
        schedule: Every rank keeps the order of its actions.
        costs: Of the actions.
        cluster: Links and media; a medium never carries more than one flow alone would get.
    """
    nodes = graph(plan, schedule, costs, cluster)
    heads = _heads(nodes)
    tails = _heads(_reversed(nodes))[::-1]
    longest = max(
        (h + n.duration_s + t for h, n, t in zip(heads, nodes, tails, strict=True)), default=0.0
    )
    return max(longest, _fluid_s(nodes, heads, tails))


def graph(plan: Plan, schedule: Schedule, costs: StepCosts, cluster: Cluster) -> list[Node]:
    """Returns the nodes of a schedule in an order in which each comes after what it needs."""
    waiting = {
        action: _needs(action, rank, schedule, plan)
        for rank, actions in enumerate(schedule.actions_by_rank)
        for action in actions
        if action.kind in ("F", "B") or action.kind.startswith("SEND")
    }
    rank_of = {a: r for r, actions in enumerate(schedule.actions_by_rank) for a in actions}
    index: dict[Action, int] = {}
    nodes: list[Node] = []
    stack = list(waiting)[::-1]
    while stack:
        action = stack[-1]
        missing = [need for need in waiting[action] if need not in index]
        if action in index:
            stack.pop()
        elif missing:
            stack += missing
        else:
            stack.pop()
            before = tuple(index[need] for need in waiting[action])
            index[action] = len(nodes)
            nodes.append(_node(action, before, rank_of[action], plan, costs, cluster))
    ends = _last_computes(schedule, index)
    for ranks, num_bytes in costs.reductions:
        _add_ring(nodes, ranks, num_bytes, ends, plan, cluster)
    return nodes


def _needs(action: Action, rank: int, schedule: Schedule, plan: Plan) -> list[Action]:
    stage, kind, m = action
    own = [a for a in schedule.actions_by_rank[rank] if a.kind in ("F", "B")]
    if kind in ("F", "B"):
        i, up = own.index(action), kind == "F"
        message = Action(stage - 1 if up else stage + 1, f"SEND_{kind}", m)
        has_message = 0 <= message.stage < len(plan.stages)
        return own[max(i - 1, 0) : i] + [message] * has_message
    # A message moves once it is sent and its receive is posted.
    to = stage + 1 if kind == "SEND_F" else stage - 1
    dst = plan.rank_of(to, plan.routes[m][to])
    receiver = schedule.actions_by_rank[dst]
    posted = receiver.index(Action(to, f"RECV_{kind[-1]}", m))
    before = [a for a in receiver[:posted] if a.kind in ("F", "B")]
    return [Action(stage, kind[-1], m), *before[-1:]]


def _node(
    action: Action,
    before: tuple[int, ...],
    rank: int,
    plan: Plan,
    costs: StepCosts,
    cluster: Cluster,
) -> Node:
    stage, kind, m = action
    if kind in ("F", "B"):
        return Node(costs.compute_s[rank, kind], before)
    to = stage + 1 if kind == "SEND_F" else stage - 1
    dst = plan.rank_of(to, plan.routes[m][to])
    return Node(*_crossing(rank, dst, costs.send_bytes[stage, kind], before, plan, cluster))


def _crossing(
    src: int, dst: int, num_bytes: float, before: tuple[int, ...], plan: Plan, cluster: Cluster
) -> tuple[float, tuple[int, ...], tuple[tuple[str, float], ...]]:
    ends = plan.devices[src], plan.devices[dst]
    media = next((link.media for link in cluster.links if (link.src, link.dst) == ends), None)
    if media is None:
        raise ValueError(f"no link from {ends[0]} to {ends[1]}")
    known = {medium.name: medium for medium in cluster.media}
    uses = tuple(
        (
            name,
            num_bytes
            * media.count(name)
            / (known[name].rate_bytes_per_s * known[name].contention[0]),
        )
        for name in dict.fromkeys(media)
    )
    latency_s = sum(known[name].latency_s for name in media)
    return max(seconds for _, seconds in uses) + latency_s, before, uses


def _last_computes(schedule: Schedule, index: dict[Action, int]) -> dict[int, int]:
    return {
        rank: max(index[a] for a in actions if a.kind in ("F", "B"))
        for rank, actions in enumerate(schedule.actions_by_rank)
        if any(a.kind in ("F", "B") for a in actions)
    }


def _add_ring(
    nodes: list[Node],
    ranks: tuple[int, ...],
    num_bytes: float,
    ends: dict[int, int],
    plan: Plan,
    cluster: Cluster,
) -> None:
    """Adds a ring all-reduce: each rank sends on what it received in the round before.

    The first round leaves a rank that is done early before the others are.
    """
    k = len(ranks)
    before = [(ends[rank],) if rank in ends else () for rank in ranks]
    for _ in range(2 * (k - 1)):
        first = len(nodes)
        for i, rank in enumerate(ranks):
            crossing = rank, ranks[(i + 1) % k], num_bytes / k
            nodes.append(Node(*_crossing(*crossing, before[i], plan, cluster)))
        before = [(first + (i - 1) % k,) for i in range(k)]
    for rank, received in zip(ranks, before, strict=True):
        ends.update((rank, node) for node in received)


def _reversed(nodes: Sequence[Node]) -> list[Node]:
    """Returns the graph with time running backwards, in reverse order."""
    last = len(nodes) - 1
    after: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for before in node.before:
            after[before].append(last - i)
    return [Node(n.duration_s, tuple(after[last - i]), n.uses) for i, n in enumerate(nodes[::-1])]


def _heads(nodes: Sequence[Node]) -> list[float]:
    """Returns when each node can start at the earliest: paths, and what media carry before it."""
    heads: list[float] = []
    # Bit i of carried[n][medium]: transfer i has to pass the medium before node n starts.
    carried: list[dict[str, int]] = []
    for node in nodes:
        ready_s = max((heads[b] + nodes[b].duration_s for b in node.before), default=0.0)
        sets: dict[str, int] = {}
        for b in node.before:
            for medium, bits in carried[b].items():
                sets[medium] = sets.get(medium, 0) | bits
            for medium, _ in nodes[b].uses:
                sets[medium] = sets.get(medium, 0) | 1 << b
        for medium, bits in sets.items():
            ready_s = max(ready_s, _passed_s(medium, bits, nodes, heads))
        heads.append(ready_s)
        carried.append(sets)
    return heads


def _passed_s(medium: str, bits: int, nodes: Sequence[Node], heads: Sequence[float]) -> float:
    """Returns when a medium can have carried all of a set: least head of any part, and the part."""
    members = [i for i in range(bits.bit_length()) if bits >> i & 1]
    members.sort(key=lambda i: -heads[i])
    total_s = passed_s = 0.0
    for i in members:
        total_s += dict(nodes[i].uses)[medium]
        passed_s = max(passed_s, heads[i] + total_s)
    return passed_s


def _fluid_s(nodes: Sequence[Node], heads: Sequence[float], tails: Sequence[float]) -> float:
    """Returns the end of the linear program.

    Variables: the start of every node, the mean busy time of every use of a medium, the end.
    """
    uses = [(i, medium, q) for i, node in enumerate(nodes) for medium, q in node.uses if q > 0]
    n, end = len(nodes), len(nodes) + len(uses)
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficients x variables >= value
    for i, node in enumerate(nodes):
        rows += [({i: 1.0, b: -1.0}, nodes[b].duration_s) for b in node.before]
        rows.append(({end: 1.0, i: -1.0}, node.duration_s))
    for k, (i, _, q) in enumerate(uses):
        # The bytes pass between the start and the end of the transfer, never faster than alone.
        rows.append(({n + k: 1.0, i: -1.0}, q / 2))
        latest: dict[int, dict[int, float]] = {n + k: {n + k: -1.0}}
        for j, other in enumerate(nodes):
            if i in other.before:
                latest[j] = {j: 1.0, n + k: -1.0}
        rows += [(row, q / 2) for j, row in latest.items() if j != n + k]
        rows.append(({end: 1.0, n + k: -1.0}, q / 2 + tails[i]))
    rows += _cuts(uses, heads, tails, n, end)
    bounds = [(head, None) for head in heads] + [(0, None)] * (len(uses) + 1)
    return _solve(rows, end, bounds)


def _cuts(
    uses: Sequence[tuple[int, str, float]],
    heads: Sequence[float],
    tails: Sequence[float],
    n: int,
    end: int,
) -> list[tuple[dict[int, float], float]]:
    """Returns the inequality of the module, both ways, for sets late in head and long in tail."""
    rows: list[tuple[dict[int, float], float]] = []
    by_medium: dict[str, list[int]] = defaultdict(list)
    for k, (_, medium, _) in enumerate(uses):
        by_medium[medium].append(k)
    for members in by_medium.values():
        sets = set()
        for head in _thresholds([heads[uses[k][0]] for k in members]):
            for tail in _thresholds([tails[uses[k][0]] for k in members]):
                sets.add(
                    tuple(
                        k
                        for k in members
                        if heads[uses[k][0]] >= head and tails[uses[k][0]] >= tail
                    )
                )
        for chosen in sets:
            total = sum(uses[k][2] for k in chosen)
            if len(chosen) > 1:
                head = min(heads[uses[k][0]] for k in chosen)
                tail = min(tails[uses[k][0]] for k in chosen)
                forward = {n + k: uses[k][2] for k in chosen}
                backward = {n + k: -uses[k][2] for k in chosen} | {end: total}
                rows.append((forward, total * (head + total / 2)))
                rows.append((backward, total * (tail + total / 2)))
    return rows


def _thresholds(values: Sequence[float]) -> list[float]:
    return sorted(
        {float(np.quantile(values, q, method="lower")) for q in np.linspace(0, 1, _NUM_THRESHOLDS)}
    )


def _solve(
    rows: Sequence[tuple[dict[int, float], float]],
    end: int,
    bounds: Sequence[tuple[float, float | None]],
) -> float:
    # Loading it takes longer than most plans do.
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    entries = [(r, v, -c) for r, (row, _) in enumerate(rows) for v, c in row.items()]
    r, v, c = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = coo_matrix((c, (r, v)), shape=(len(rows), end + 1)).tocsr()
    cost = np.zeros(end + 1)
    cost[end] = 1
    found = linprog(cost, A_ub=matrix, b_ub=[-value for _, value in rows], bounds=bounds)
    # A solver that gives up proves nothing.
    return float(found.fun) if found.status == 0 else 0.0
