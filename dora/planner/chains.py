"""Prepares the search over chains of device groups (`csrc/chains`): phase one, on bounds.

Every group of devices may become a stage. Of a handful of devices all subsets are groups; of many,
single devices, runs of equal ones and pairs of the fast ones, since a replica helps most where
devices are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from dora import _C
from dora.planner.codecs import CODECS, wire_ratio
from dora.planner.cost import Array, Links, StageCosts
from dora.planner.predict import Group, Setting
from dora.spec import Cluster, Device

# 2^7 groups of at most 7 devices; of more, subsets would outnumber what can be bounded in time.
MAX_SUBSETS = 7
MAX_GROUPS = 160
# Media whose load is bounded; a cluster has few that several devices send on.
MAX_MEDIA = 8
# As in csrc/chains.cpp.
MAX_DEVICES = 256


class Chain(NamedTuple):
    """Stages that no schedule runs in less than the bounds, with the micro-batches of replicas."""

    bound_s: float
    bound_j: float
    groups: tuple[Group, ...]
    counts: tuple[tuple[int, ...], ...]
    known: Setting

    def bound(self, objective: str) -> float:
        """Returns seconds or joules."""
        return self.bound_s if objective == "time" else self.bound_j


class Chains:
    """The search space of one `Setting`."""

    def __init__(
        self, known: Setting, media: Sequence[Array], twin_of: dict[int, int], max_loss: float
    ) -> None:
        """Collects costs and groups.

        Args:
            known: Of one number of micro-batches.
            media: From `shared_media`.
            twin_of: From `twins`.
            max_loss: Codecs of up to that accuracy loss may be used.
        """
        self.known = known
        self.ratio = min(
            wire_ratio(n, known.dtype) for n, c in CODECS.items() if c.loss <= max_loss
        )
        self.costs = _whole_request(known, known.decode) if known.decode else known.costs
        self.groups = list(_groups(known, twin_of))
        self.problem = self._problem(media, twin_of)

    def enumerate(
        self, objective: str, *, cutoff_s: float, cutoff_j: float, width: int, per_state: int
    ) -> tuple[list[Chain], float]:
        """Returns chains in the order of their bounds, and the least bound of those left out.

        Args:
            objective: 'time' or 'energy'.
            cutoff_s: Chains whose bound is not below it are left out.
            cutoff_j: The same for energy.
            width: Chains kept per block.
            per_state: Of those, with the same devices and first group.
        """
        found, dropped = _C.enumerate_chains(
            self.problem, objective == "energy", cutoff_s, cutoff_j, width, per_state
        )
        return [self._chain(*one) for one in found], dropped

    def least(self, objective: str) -> float:
        """Returns what no chain of any groups can beat, from the work alone."""
        problem, m = self.problem, self.known.num_microbatches
        block_s = np.diff(problem["forward_s"] + problem["backward_s"], axis=1)
        if objective == "energy":
            return float(m * (block_s * problem["extra_w"][:, None]).min(axis=0).sum())
        best_s = block_s.min(axis=0)
        ratio = np.divide(best_s, block_s, out=np.ones_like(block_s), where=block_s > 0)
        return float(max(best_s.sum(), m * best_s.sum() / ratio.max(axis=1).sum()))

    def _chain(
        self, bound_s: float, bound_j: float, groups: Sequence[int], ends: Sequence[int]
    ) -> Chain:
        firsts = [0, *ends[:-1]]
        stages = tuple(
            Group(first, end, self.groups[g])
            for first, end, g in zip(firsts, ends, groups, strict=True)
        )
        return Chain(bound_s, bound_j, stages, shares(stages, self.known), self.known)

    def _problem(self, media: Sequence[Array], twin_of: dict[int, int]) -> dict[str, Any]:
        known, costs = self.known, self.costs
        devices = known.devices
        fastest = np.array([max([1.0, *(m.speed_factor for m in d.power_modes)]) for d in devices])
        fastest = fastest[:, None]
        return {
            "num_microbatches": known.num_microbatches,
            "is_training": known.training,
            "forward_s": costs.forward_s[:, 0, :] / fastest,
            "backward_s": costs.backward_s[:, 0, :] / fastest,
            "state_bytes": known.costs.state_bytes,
            "gradient_bytes": costs.gradient_bytes * self.ratio,
            "activation_bytes": known.costs.activation_bytes,
            "buffer_bytes": known.costs.buffer_bytes,
            "boundary_bytes": np.append(
                costs.boundary_bytes[:1], costs.boundary_bytes[1:] * self.ratio
            ),
            "memory_bytes": np.array([d.memory_bytes for d in devices], dtype=float),
            "idle_w": np.array([d.idle_w for d in devices]),
            "extra_w": np.array([max(d.busy_w - d.idle_w, 0.0) * _thrift(d) for d in devices])
            * fastest[:, 0],
            "tx_j_per_byte": np.array([d.tx_j_per_byte for d in devices]),
            "rx_j_per_byte": np.array([d.rx_j_per_byte for d in devices]),
            "s_per_byte": np.where(np.isfinite(known.links.s_per_byte), known.links.s_per_byte, 0),
            "latency_s": known.links.latency_s,
            "medium_s_per_byte": media,
            "hops": 1 + _further_passes(known),
            "source": -1 if known.source is None else known.source,
            "groups": self.groups,
            "twins": [twin_of[d] for d in range(len(devices))],
        }


def _thrift(device: Device) -> float:
    """Returns the least energy that a power mode needs for the same work, over the default's."""
    return min([1.0, *(m.power_factor / m.speed_factor for m in device.power_modes)])


def shares(groups: Sequence[Group], known: Setting) -> tuple[tuple[int, ...], ...]:
    """Returns the micro-batches of each replica of each stage, by their speed."""
    total_s = [known.costs.forward_s, known.costs.backward_s]
    return tuple(
        tuple(
            _C.share_microbatches(
                [float(sum(t[d, g.first, g.end] for t in total_s)) for d in g.devices],
                known.num_microbatches,
            )
        )
        for g in groups
    )


def _whole_request(known: Setting, decode: StageCosts) -> StageCosts:
    """Returns the costs of the prompt with those of all further tokens, per piece of the prompt.

    The pieces are a pipeline, the further tokens go through it one by one, and every bound of the
    pipeline holds for such a share of them too.
    """
    share = _further_passes(known)
    passed = decode.boundary_bytes * share
    passed[0] = 0  # a further token does not come from the source
    return known.costs._replace(
        forward_s=known.costs.forward_s + decode.forward_s * share,
        boundary_bytes=known.costs.boundary_bytes + passed,
    )


def _further_passes(known: Setting) -> float:
    """Returns the passes after the prompt, which gives the first token, per piece of the prompt."""
    return max(known.new_tokens - 1, 0) / known.num_microbatches


def shared_media(cluster: Cluster, devices: Sequence[Device]) -> list[Array]:
    """Returns, per medium that joins several senders and receivers, seconds per byte of each pair.

    Media that most pairs cross come first; what only one device uses is its own link.
    """
    index = {device.name: d for d, device in enumerate(devices)}
    rate = {medium.name: medium.rate_bytes_per_s for medium in cluster.media}
    crossed: dict[str, list[tuple[int, int, float]]] = {name: [] for name in rate}
    for link in cluster.links:
        if link.src in index and link.dst in index:
            for name in set(link.media):
                s_per_byte = link.media.count(name) / rate[name]
                crossed[name].append((index[link.src], index[link.dst], s_per_byte))
    shared = [
        pairs
        for pairs in crossed.values()
        if len({src for src, _, _ in pairs}) > 1 and len({dst for _, dst, _ in pairs}) > 1
    ]
    shared.sort(key=lambda pairs: -sum(s_per_byte for *_, s_per_byte in pairs))
    tables = []
    for pairs in shared[:MAX_MEDIA]:
        table = np.zeros((len(devices), len(devices)))
        for src, dst, s_per_byte in pairs:
            table[src, dst] = s_per_byte
        tables.append(table)
    return tables


def _groups(known: Setting, twin_of: dict[int, int]) -> Iterator[tuple[int, ...]]:
    """Yields the groups that may become a stage, each once."""
    n = len(known.devices)
    # One sequence can not be spread over replicas.
    most = 1 if known.decode else min(n, known.num_microbatches)
    if n <= MAX_SUBSETS:
        yield from (s for k in range(1, most + 1) for s in combinations(range(n), k))
        return
    yield from ((d,) for d in range(n))
    seen: set[tuple[int, ...]] = set()
    total_s = known.costs.forward_s[:, 0, -1] + known.costs.backward_s[:, 0, -1]
    fast = [int(d) for d in np.argsort(total_s, kind="stable")]
    classes = [[d for d in range(n) if twin_of[d] == c] for c in sorted(set(twin_of.values()))]
    runs = [
        tuple(twin[i : i + k])
        for k in range(2, most + 1)
        for twin in classes
        for i in range(0, len(twin) - k + 1)
    ]
    fastest = [tuple(fast[:k]) for k in range(2, most + 1)]
    pairs = list(combinations(fast[:12], 2)) if most > 1 else []
    neighbours = [tuple(fast[i : i + k]) for k in range(2, most + 1) for i in range(n - k + 1)]
    for group in [*fastest, *pairs, *runs, *neighbours]:
        ordered = tuple(sorted(group))
        if ordered not in seen and len(seen) < MAX_GROUPS:
            seen.add(ordered)
            yield ordered


def twins(known: Setting, media: Sequence[Array]) -> dict[int, int]:
    """Maps each device to the first one that it can not be told from by any cost.

    Args:
        known: Any setting of the devices.
        media: From `shared_media`.
    """
    first: dict[int, int] = {}
    for d in range(len(known.devices)):
        alike = (e for e in range(d) if first[e] == e and _are_twins(known, media, d, e))
        first[d] = next(alike, d)
    return first


def _are_twins(known: Setting, media: Sequence[Array], d: int, e: int) -> bool:
    a, b = known.devices[d], known.devices[e]
    costs = known.costs
    return (
        known.source not in (d, e)
        and np.array_equal(costs.forward_s[d], costs.forward_s[e])
        and np.array_equal(costs.backward_s[d], costs.backward_s[e])
        and a.model_copy(update={"name": ""}) == b.model_copy(update={"name": ""})
        and _are_linked_alike(known.links, media, d, e)
    )


def _are_linked_alike(links: Links, media: Sequence[Array], d: int, e: int) -> bool:
    swap = np.arange(len(links.latency_s))
    swap[[d, e]] = e, d

    def swapped(table: Array) -> Array:
        return np.ascontiguousarray(table[np.ix_(swap, swap)])

    # As a set: what only one of the two uses may be like what only the other one does.
    same_media = {m.tobytes() for m in media} == {swapped(m).tobytes() for m in media}
    tables = (links.latency_s, links.s_per_byte)
    return same_media and all(np.array_equal(t, swapped(t)) for t in tables)
