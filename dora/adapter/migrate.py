"""Who sends which block to whom, so that a new plan can run, with the least bytes moved.

SpotServe (Miao et al., Serverless Large Language Models on Preemptible Instances, ASPLOS 2024,
https://arxiv.org/abs/2311.15566) maps a new arrangement onto the machines by a maximum-weight
matching, where a pair weighs what its machine already holds. Here machines differ, and a plan says
which one does what; the matching is over those that are interchangeable, `twins`. Blocks come from
whichever holder makes the network ready first.

`held` is what each device has of the model; a block's bytes are all that moves with it: weights,
and optimizer state or a KV cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import inf

import numpy as np
from scipy.optimize import linear_sum_assignment

from dora.spec import Cluster, Conditions, Link, Migration, Move, Plan, SwitchCost

Held = Mapping[str, AbstractSet[int]]

# The switch itself: every rank says that it is ready, and each builds its new Action list.
BARRIER_S = 0.05


def placed(plan: Plan) -> dict[str, frozenset[int]]:
    """Returns the blocks that each device of a plan runs."""
    return {
        replica.device: frozenset(range(stage.first_block, stage.last_block + 1))
        for stage in plan.stages
        for replica in stage.replicas
    }


def twins(cluster: Cluster) -> tuple[tuple[str, ...], ...]:
    """Returns groups of devices that differ in nothing but their names, in rank order."""
    groups: dict[object, list[str]] = {}
    users = _users(cluster)
    for device in cluster.devices:
        own = [link for link in cluster.links if device.name in (link.src, link.dst)]
        rest = device.model_copy(update={"name": "any"}).model_dump_json()
        paths = sorted(repr(_path(link, device.name, users, cluster)) for link in own)
        groups.setdefault((rest, tuple(paths)), []).append(device.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _users(cluster: Cluster) -> dict[str, set[str]]:
    """Returns, per medium, the devices that all of its links have in common."""
    users: dict[str, set[str]] = {}
    for link in cluster.links:
        for name in link.media:
            users[name] = users.get(name, {link.src, link.dst}) & {link.src, link.dst}
    return users


def _path(link: Link, name: str, users: Mapping[str, set[str]], cluster: Cluster) -> object:
    """Returns the media of a link, with ports of one device described and shared ones named."""
    media = {medium.name: medium for medium in cluster.media}
    crossed = [
        media[m].model_copy(update={"name": "port"}).model_dump_json() if users[m] else m
        for m in link.media
    ]
    return link.src == name, crossed


def relabelled(
    plan: Plan, held: Held, groups: Sequence[Sequence[str]], block_bytes: Sequence[int]
) -> Plan:
    """Returns an equally good plan in which twins have changed roles to move the least bytes.

    Args:
        plan: The new one.
        held: What each device has now.
        groups: From `twins`.
        block_bytes: Per block.
    """
    roles, names = placed(plan), {}
    for group in groups:
        # A device that is where it would be anyway wins ties, by less than a byte.
        weight = np.array(
            [
                [
                    sum(block_bytes[b] for b in roles.get(role, ()) if b in held.get(name, ()))
                    + 0.5 * (name == role)
                    for role in group
                ]
                for name in group
            ]
        )
        for row, column in zip(*linear_sum_assignment(weight, maximize=True), strict=True):
            if group[row] != group[column]:
                names[group[column]] = group[row]
    return _renamed(plan, names) if names else plan


def _renamed(plan: Plan, names: Mapping[str, str]) -> Plan:
    stages = tuple(
        stage.model_copy(
            update={
                "replicas": tuple(
                    r.model_copy(update={"device": names.get(r.device, r.device)})
                    for r in stage.replicas
                )
            }
        )
        for stage in plan.stages
    )
    cost = plan.cost and plan.cost.model_copy(
        update={
            "memory": tuple(
                m.model_copy(update={"device": names.get(m.device, m.device)})
                for m in plan.cost.memory
            )
        }
    )
    # Transfers name ranks, which are others now; their order follows from their tails again.
    return plan.model_copy(update={"stages": stages, "cost": cost, "transfers": ()})


def migration(
    held: Held,
    plan: Plan,
    block_bytes: Sequence[int],
    cluster: Cluster,
    *,
    conditions: Conditions = Conditions(),  # noqa: B008, immutable
    gone: Collection[str] = (),
) -> Migration:
    """Returns the moves that give every device of a plan its blocks.

    Blocks go in the order of the model, the largest choice last: each comes from the holder over
    whose path the most loaded medium ends earliest.

    Args:
        held: What each device has.
        plan: What is to run.
        block_bytes: Per block, all that has to move with it.
        cluster: Links and rates.
        conditions: Of its media.
        gone: Devices that can give nothing.
    """
    paths, seconds = _paths(cluster, conditions)
    busy_s: dict[str, float] = {}
    moves, lost, kept = [], [], 0
    for name, blocks in placed(plan).items():
        for block in sorted(blocks):
            if block in held.get(name, ()):
                kept += block_bytes[block]
                continue
            sources = [s for s, b in held.items() if block in b and s not in gone and s != name]
            ends = {s: _end_s(paths.get((s, name)), seconds, busy_s, block_bytes[block])
                    for s in sources}  # fmt: skip
            src = min(ends, key=lambda s: (ends[s], s), default=None)
            if src is None or ends[src] == inf:
                lost.append((block, name))
                continue
            for medium in paths[src, name]:
                busy_s[medium] = busy_s.get(medium, 0.0) + block_bytes[block] * seconds[medium]
            moves.append(Move(block, src, name, block_bytes[block]))
    transfer_s = inf if lost else max(busy_s.values(), default=0.0)
    return Migration(tuple(moves), tuple(lost), kept, transfer_s)


def _paths(
    cluster: Cluster, conditions: Conditions
) -> tuple[dict[tuple[str, str], tuple[str, ...]], dict[str, float]]:
    """Returns the media between devices, and the seconds that a byte takes on each."""
    factors = dict(conditions.factors)
    rates = {m.name: m.rate_bytes_per_s * factors.get(m.name, 1.0) for m in cluster.media}
    seconds = {name: 1 / rate if rate > 0 else inf for name, rate in rates.items()}
    return {(link.src, link.dst): link.media for link in cluster.links}, seconds


def _end_s(
    media: Sequence[str] | None,
    seconds: Mapping[str, float],
    busy_s: Mapping[str, float],
    num_bytes: int,
) -> float:
    if media is None:
        return inf
    return max(busy_s.get(m, 0.0) + media.count(m) * num_bytes * seconds[m] for m in media)


def remaining(given: Migration, done: Collection[tuple[int, str]], cluster: Cluster) -> Migration:
    """Returns what is left of a migration, to be taken up again after a break.

    Args:
        given: The whole.
        done: (block, destination) that have arrived.
        cluster: Links and rates.
    """
    moves = tuple(move for move in given.moves if (move.block, move.dst) not in done)
    kept = given.kept_bytes + given.num_bytes - sum(move.num_bytes for move in moves)
    paths, seconds = _paths(cluster, Conditions())
    busy_s: dict[str, float] = {}
    for move in moves:
        for medium in paths[move.src, move.dst]:
            busy_s[medium] = busy_s.get(medium, 0.0) + move.num_bytes * seconds[medium]
    return Migration(moves, given.lost, kept, max(busy_s.values(), default=0.0))


def switch_cost(given: Migration, cluster: Cluster, *, is_live: bool) -> SwitchCost:
    """Returns what a migration costs.

    Args:
        given: Its moves.
        cluster: Radios.
        is_live: Every step changes what moves, as training does with weights and optimizer state:
            then it has to move while nothing runs. Weights for inference move before the switch.
    """
    devices = {device.name: device for device in cluster.devices}
    energy_j = sum(
        move.num_bytes * (devices[move.src].tx_j_per_byte + devices[move.dst].rx_j_per_byte)
        for move in given.moves
    )
    pause_s = BARRIER_S + (given.transfer_s if is_live else 0.0)
    return SwitchCost(pause_s, 0.0 if is_live else given.transfer_s, energy_j)
