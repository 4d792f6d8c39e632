"""Mixes plans: shares of steps or requests that keep a QoE on average at the least energy.

A plan that is too slow and frugal and one that is fast and hungry, in turn, can keep an average
that neither keeps at that energy. The shares are a linear program; a solution at a corner uses at
most one plan more than there are binding constraints. Plans are taken in turn by weighted round
robin, so that the average holds over short windows, not just in the end.

Serving, all plans of a mix keep their weights in place, which `Memory` bounds. Training, weights
change at every step and have to be handed over: phases of many steps, at a `Toll`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from dora.spec import Forecast

Array = NDArray[np.float64]

# A plan with a smaller share is not worth keeping in memory; solvers return such crumbs.
LEAST_SHARE = 1e-3


class Memory(NamedTuple):
    """What plans need when their weights are in place together.

    Attributes:
        held: Per option and device, the blocks whose weights it needs.
        working: Per option and device, the bytes beside them; plans take turns with these.
        block_bytes: Of the weights of each block.
        capacity: Per device.
    """

    held: Sequence[Mapping[str, AbstractSet[int]]]
    working: Sequence[Mapping[str, float]]
    block_bytes: Sequence[int]
    capacity: Mapping[str, float]

    def fits(self, used: Sequence[int]) -> bool:
        """Returns whether those options fit together."""
        return all(self._need(device, used) <= most for device, most in self.capacity.items())

    def _need(self, device: str, used: Sequence[int]) -> float:
        blocks = frozenset().union(*(self.held[i].get(device, frozenset()) for i in used))
        working = max((self.working[i].get(device, 0.0) for i in used), default=0.0)
        return sum(self.block_bytes[b] for b in blocks) + working


class Toll(NamedTuple):
    """What handing over between the plans of a mix costs, per step.

    Attributes:
        excess: Share of the time bound: seconds per cycle / (steps of a cycle * bound).
        value: Of the objective.
    """

    excess: float = 0.0
    value: float = 0.0


class Mix(NamedTuple):
    """Shares of options, by their index, and what they come to on average.

    Attributes:
        value: Of the objective, with the toll.
        excess: Of the averages, largest; at most 1.
    """

    shares: tuple[tuple[int, float], ...]
    value: float
    excess: float


def compose(
    options: Sequence[Forecast | None],
    objective: str = "energy",
    *,
    late: Sequence[float] | None = None,
    percentile: float | None = None,
    battery_j: float | None = None,
    memory: Memory | None = None,
    toll: Toll = Toll(),  # noqa: B008, immutable
) -> Mix | None:
    """Returns the best mix, which may be one plan; None if none keeps the bounds.

    Args:
        options: What each plan takes; None for one that can not run. Without `percentile`, the
            average of every excess must be at most 1.
        objective: 'energy' or 'time', to be least on average.
        late: Per option, the share of its items that break a bound.
        percentile: Bounds the average of `late` instead, at (100 - percentile) percent.
        battery_j: Bounds the average from batteries.
        memory: Bounds which plans can be in place together.
        toll: Of a mix of more than one plan.
    """
    usable = [i for i, f in enumerate(options) if f is not None]
    found = [options[i] for i in usable]
    forecasts = [f for f in found if f is not None]
    if not forecasts:
        return None
    values = np.array([f.value(objective) for f in forecasts])
    rows, limits = _bounds(forecasts, usable, late, percentile, battery_j)
    single = _best_single(values, rows, limits, usable, memory)
    eased = limits - (toll.excess if percentile is None else 0.0) * _is_time(rows, battery_j)
    shares = _solve(values, rows, eased, usable, memory)
    if shares is None:
        return single
    value = float(values @ shares) + toll.value * (np.count_nonzero(shares) > 1)
    if single is not None and single.value <= value * (1 + 1e-9):
        return single
    return Mix(
        tuple((usable[int(k)], float(shares[k])) for k in np.flatnonzero(shares)),
        value,
        _excess(rows, limits, shares),
    )


def _bounds(
    forecasts: Sequence[Forecast],
    usable: Sequence[int],
    late: Sequence[float] | None,
    percentile: float | None,
    battery_j: float | None,
) -> tuple[Array, Array]:
    """Returns rows and limits: rows @ shares <= limits; that of the battery is the last."""
    if percentile is None:
        rows = [list(column) for column in zip(*(f.excess for f in forecasts), strict=True)]
        limits = [1.0] * len(rows)
    else:
        given = late or [float(f.worst > 1) for f in forecasts]
        rows, limits = [[given[i] for i in usable] if late else list(given)], [1 - percentile / 100]
    if battery_j is not None:
        rows.append([f.battery_j for f in forecasts])
        limits.append(battery_j)
    return np.array(rows).reshape(len(rows), len(forecasts)), np.array(limits)


def _is_time(rows: Array, battery_j: float | None) -> Array:
    marks = np.ones(len(rows))
    if battery_j is not None:
        marks[-1] = 0.0
    return marks


def _best_single(
    values: Array, rows: Array, limits: Array, usable: Sequence[int], memory: Memory | None
) -> Mix | None:
    keeps = (rows <= limits[:, None] * (1 + 1e-9) + 1e-12).all(axis=0)
    fits = [memory is None or memory.fits([i]) for i in usable]
    allowed = np.flatnonzero(keeps & np.array(fits))
    if not len(allowed):
        return None
    best = int(allowed[np.argmin(values[allowed])])
    shares = np.zeros(len(values))
    shares[best] = 1.0
    return Mix(((usable[best], 1.0),), float(values[best]), _excess(rows, limits, shares))


def _excess(rows: Array, limits: Array, shares: Array) -> float:
    return max((float(r @ shares) / m if m else 1.0 for r, m in zip(rows, limits, strict=True)),
               default=0.0)  # fmt: skip


def _solve(
    values: Array, rows: Array, limits: Array, usable: Sequence[int], memory: Memory | None
) -> Array | None:
    """Returns the best shares, None if there are none; whole numbers only where memory binds."""
    n = len(values)
    done = linprog(
        values,
        A_ub=rows if len(rows) else None,
        b_ub=limits if len(rows) else None,
        A_eq=np.ones((1, n)),
        b_eq=[1.0],
        bounds=(0, 1),
        method="highs-ds",  # the simplex method ends at a corner: few plans
    )
    if done.status != 0:
        return None
    shares = _cleaned(done.x)
    if memory is None or memory.fits([usable[int(k)] for k in np.flatnonzero(shares)]):
        return shares
    return _solve_with_memory(values, rows, limits, usable, memory)


def _cleaned(x: Array) -> Array:
    shares: Array = np.where(x < LEAST_SHARE, 0.0, x)
    # Scaling up what is left moves averages by less than a thousandth.
    shares /= shares.sum()
    return shares


def _solve_with_memory(
    values: Array, rows: Array, limits: Array, usable: Sequence[int], memory: Memory
) -> Array | None:
    """Returns the same by a mixed integer program: which plans are used, and what that places.

    Columns: shares w, then use y of each plan, then weights r in place of (device, block), then
    working memory u of each device.
    """
    n, devices = len(values), list(memory.capacity)
    places = sorted({(d, b) for i in usable for d, blocks in memory.held[i].items() for b in blocks
                     if d in memory.capacity})  # fmt: skip
    at = {place: 2 * n + k for k, place in enumerate(places)}
    first_u = 2 * n + len(places)
    width = first_u + len(devices)
    lines: list[tuple[dict[int, float], float]] = []  # coefficients, upper limit
    for row, limit in zip(rows, limits, strict=True):
        lines.append(({k: float(v) for k, v in enumerate(row)}, float(limit)))
    for k, i in enumerate(usable):
        lines.append(({k: 1.0, n + k: -1.0}, 0.0))
        for d, blocks in memory.held[i].items():
            lines += [({n + k: 1.0, at[d, b]: -1.0}, 0.0) for b in blocks if (d, b) in at]
        for u, d in enumerate(devices):
            need = memory.working[i].get(d, 0.0) / memory.capacity[d]
            lines.append(({n + k: need, first_u + u: -1.0}, 0.0))
    for u, d in enumerate(devices):
        sizes = {at[e, b]: memory.block_bytes[b] / memory.capacity[d] for e, b in places if e == d}
        lines.append(({**sizes, first_u + u: 1.0}, 1.0))
    matrix = np.zeros((len(lines) + 1, width))
    upper = np.array([limit for _, limit in lines] + [1.0])
    for row_index, (entries, _) in enumerate(lines):
        for column, entry in entries.items():
            matrix[row_index, column] += entry
    matrix[-1, :n] = 1.0
    lower = np.full(len(upper), -np.inf)
    lower[-1] = 1.0
    integral = np.zeros(width)
    integral[n : 2 * n] = 1
    done = milp(
        np.concatenate([values, np.zeros(width - n)]),
        constraints=LinearConstraint(matrix, lower, upper),
        bounds=Bounds(0, 1),
        integrality=integral,
    )
    return _cleaned(done.x[:n]) if done.status == 0 else None


def next_turn(counts: Sequence[int], weights: Sequence[float]) -> int:
    """Returns which plan the next item goes to: the one that is furthest behind its weight.

    Called again and again it never lets a plan get ahead of its weight by a whole item, so that of
    two plans any k items in a row hold k times the weight of each, give or take one.

    Args:
        counts: Items that each plan has had.
        weights: Shares, which sum to 1.
    """
    total = sum(counts) + 1
    behind = [w * total - c for w, c in zip(weights, counts, strict=True)]
    return max(range(len(weights)), key=lambda i: (round(behind[i], 9), -i))


def turns(weights: Sequence[float], num_items: int) -> list[int]:
    """Returns the plan of each of that many items."""
    counts, order = [0] * len(weights), []
    for _ in range(num_items):
        pick = next_turn(counts, weights)
        counts[pick] += 1
        order.append(pick)
    return order


def phases(weights: Sequence[float], cycle: int) -> list[tuple[int, int]]:
    """Returns (plan, steps) of one training cycle, each plan in one piece.

    Shares are rounded down for all but the plan that comes first, the one with the largest share;
    a plan of less than a step is left out.
    """
    counts = [int(w * cycle) for w in weights]
    first = max(range(len(weights)), key=lambda i: (weights[i], -i))
    counts[first] += cycle - sum(counts)
    order = [first, *(i for i in range(len(weights)) if i != first)]
    return [(i, counts[i]) for i in order if counts[i]]
