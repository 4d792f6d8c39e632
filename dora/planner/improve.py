"""Small changes of a layout, and descent along those that help: phase two, on played schedules.

What a chain of groups leaves open is settled here: uneven shares, windows, power modes, codecs, and
cuts that only contention makes better. Each change is small enough that a good layout is rarely
more than a few of them away from a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from math import inf, prod
from random import Random
from typing import TypeVar, Union

from dora.planner.chains import shares
from dora.planner.codecs import boundary_codecs, gradient_codecs
from dora.planner.layouts import layouts
from dora.planner.predict import NO_CODEC, Group, Layout, Setting

# Blocks by which a cut moves.
_STEPS = (-4, -2, -1, 1, 2, 4)

# Kinds of unused devices that are tried in a plan; slower ones are of no use where these are not.
MAX_SPARE = 10
# Combinations of power modes that are all tried.
MAX_MODES = 32

Groups = tuple[Group, ...]
# A layout, other stages, or another number of micro-batches.
Move = Union[Layout, tuple[Group, ...], Setting]  # noqa: UP007 (3.10 evaluates it)
Item = TypeVar("Item")


def changes(layout: Layout, known: Setting, twin_of: dict[int, int], max_loss: float) -> list[Move]:
    """Returns the changes of a layout in one respect: whole layouts, or other stages.

    Args:
        layout: To start from.
        known: Its setting.
        twin_of: Of equal devices only one is tried in place of another.
        max_loss: Codecs with a larger accuracy loss are not tried.
    """
    whole = [*_windows(layout, known), *_shifted_shares(layout), *modes(layout, known)]
    whole += codec_changes(layout, known, max_loss)
    stages = dict.fromkeys([*_cuts(layout.groups), *_devices(layout.groups, known, twin_of)])
    return [*dict.fromkeys(whole), *stages]


def regrouped(layout: Layout, groups: Groups, known: Setting) -> Layout | None:
    """Returns a layout with other stages at about the same depth, None if they can not be."""
    if not all(_can_share(group, known) for group in groups):
        return None
    counts = shares(groups, known)
    if any(0 in stage for stage in counts):
        return None
    kept = tuple((d, name) for d, name in layout.modes if any(d in g.devices for g in groups))
    if counts == layout.counts:
        return layout._replace(groups=groups, modes=kept)
    made = layouts(groups, counts, known)
    wanted = layout.warmup[0] - len(layout.groups) + len(groups)
    nearest = min(made, key=lambda one: abs(one.warmup[0] - wanted))
    if len(groups) != len(layout.groups):
        return nearest._replace(modes=kept)
    codecs, sums = layout.codecs, layout.gradient_codecs
    return nearest._replace(modes=kept, codecs=codecs, gradient_codecs=sums)


def _can_share(group: Group, known: Setting) -> bool:
    if known.decode is not None and len(group.devices) > 1:
        return False
    return len(group.devices) <= known.num_microbatches


def _windows(layout: Layout, known: Setting) -> Iterator[Layout]:
    m = layout.num_microbatches
    for one in layouts(layout.groups, layout.counts, known):
        yield layout._replace(warmup=one.warmup)
    if layout.kind != "1f1b":
        return
    for s in range(len(layout.warmup)):
        for change in (-1, 1):
            warmup = list(layout.warmup)
            warmup[s] += change
            descends = all(a >= b for a, b in pairwise(warmup))
            if descends and warmup[-1] >= 1 and warmup[0] <= m:
                yield layout._replace(warmup=tuple(warmup))


def _shifted_shares(layout: Layout) -> Iterator[Layout]:
    """Moves one micro-batch from one replica of a stage to another."""
    for s, counts in enumerate(layout.counts):
        for a in range(len(counts)):
            for b in range(len(counts)):
                if a != b and counts[a] > 1:
                    moved = list(counts)
                    moved[a] -= 1
                    moved[b] += 1
                    yield layout._replace(counts=_with(layout.counts, s, tuple(moved)))


def all_modes(layout: Layout, known: Setting) -> list[Layout]:
    """Returns the layout in every combination of power modes, or in others of one device if many.

    A few devices in a few modes have few combinations, and the best is often not one step away: a
    slower stage pays once its neighbour is slower too.
    """
    names = [_mode_names(d, known) for d in layout.devices]
    if prod(map(len, names)) > MAX_MODES:
        return list(modes(layout, known))
    combinations = (zip(layout.devices, chosen, strict=True) for chosen in product(*names))
    made = [
        tuple(sorted((d, name) for d, name in pairs if name != "default")) for pairs in combinations
    ]
    return [layout._replace(modes=one) for one in made if one != layout.modes]


def _mode_names(device: int, known: Setting) -> tuple[str, ...]:
    return ("default", *(mode.name for mode in known.devices[device].power_modes))


def modes(layout: Layout, known: Setting) -> Iterator[Layout]:
    """Yields the layouts that differ in the power mode of one device."""
    chosen = dict(layout.modes)
    for d in layout.devices:
        for name in _mode_names(d, known):
            if name == chosen.get(d, "default"):
                continue
            other = {**chosen, d: name}
            yield layout._replace(
                modes=tuple(sorted((d, name) for d, name in other.items() if name != "default"))
            )


def codec_changes(layout: Layout, known: Setting, max_loss: float) -> Iterator[Layout]:
    """Yields the layouts with other codecs of one boundary, of all, or of one sum of gradients."""
    yield from _codecs(layout, known, max_loss)
    yield from _gradient_codecs(layout, known, max_loss)


def _codecs(layout: Layout, known: Setting, max_loss: float) -> Iterator[Layout]:
    num_boundaries = len(layout.groups) - 1
    allowed = boundary_codecs(max_loss, training=known.training)
    if len(allowed) < 2:
        return
    current = layout.codecs or (NO_CODEC,) * num_boundaries
    for codec in allowed:
        yield layout._replace(codecs=(codec,) * num_boundaries if codec != NO_CODEC else ())
        for s in range(num_boundaries):
            yield layout._replace(codecs=_with(current, s, codec))


def _gradient_codecs(layout: Layout, known: Setting, max_loss: float) -> Iterator[Layout]:
    allowed = gradient_codecs(max_loss) if known.training else []
    current = layout.gradient_codecs or ("none",) * len(layout.groups)
    for s, group in enumerate(layout.groups):
        for name in allowed:
            if len(group.devices) > 1 and name != current[s]:
                names = _with(current, s, name)
                yield layout._replace(gradient_codecs=names if set(names) != {"none"} else ())


def _cuts(groups: Groups) -> Iterator[Groups]:
    """Moves a cut, merges two stages, or lets one stage end where another begins."""
    for s, (a, b) in enumerate(pairwise(groups)):
        for step in _STEPS:
            cut = a.end + step
            if a.first < cut < b.end:
                yield (
                    *groups[:s], a._replace(end=cut), b._replace(first=cut), *groups[s + 2 :],
                )  # fmt: skip
        yield (*groups[:s], a._replace(end=b.end), *groups[s + 2 :])
        yield (*groups[:s], b._replace(first=a.first), *groups[s + 2 :])
        both = tuple(sorted(a.devices + b.devices))
        yield (*groups[:s], Group(a.first, b.end, both), *groups[s + 2 :])
        # The blocks between two cuts move on as a whole.
        if s + 2 < len(groups):
            c = groups[s + 2]
            for step in (-1, 1):
                if a.first < a.end + step < b.end + step < c.end:
                    moved = (
                        a._replace(end=a.end + step),
                        Group(a.end + step, b.end + step, b.devices),
                    )
                    yield (*groups[:s], *moved, c._replace(first=b.end + step), *groups[s + 3 :])


def _devices(groups: Groups, known: Setting, twin_of: dict[int, int]) -> Iterator[Groups]:
    """Swaps, adds and drops devices."""
    spare = _spare(groups, known, twin_of)
    yield from _swaps(groups, twin_of)
    for s, group in enumerate(groups):
        for d in group.devices:
            rest = tuple(other for other in group.devices if other != d)
            if rest:
                yield _with(groups, s, group._replace(devices=rest))
                # A replica becomes a stage of its own, or joins another one.
                yield from _split(groups, s, rest, d)
            for e in spare:
                yield _with(groups, s, group._replace(devices=tuple(sorted((*rest, e)))))
            for t, other in enumerate(groups):
                if t != s and rest:
                    joined = other._replace(devices=tuple(sorted((*other.devices, d))))
                    yield _with(_with(groups, s, group._replace(devices=rest)), t, joined)
        for e in spare:
            yield _with(groups, s, group._replace(devices=tuple(sorted((*group.devices, e)))))
            yield from _split(groups, s, group.devices, e)


def _spare(groups: Groups, known: Setting, twin_of: dict[int, int]) -> list[int]:
    """Returns the fastest devices that are in no stage, one of each set of equals."""
    used = {d for group in groups for d in group.devices}
    free: dict[int, int] = {}
    for d in range(len(known.devices)):
        if d not in used:
            free.setdefault(twin_of[d], d)
    return sorted(free.values(), key=lambda d: float(known.costs.forward_s[d, 0, -1]))[:MAX_SPARE]


def _swaps(groups: Groups, twin_of: dict[int, int]) -> Iterator[Groups]:
    for s, a in enumerate(groups):
        for t in range(s + 1, len(groups)):
            b = groups[t]
            for d in a.devices:
                for e in b.devices:
                    if twin_of[d] != twin_of[e]:
                        first = tuple(sorted({*a.devices, e} - {d}))
                        second = tuple(sorted({*b.devices, d} - {e}))
                        changed = _with(groups, s, a._replace(devices=first))
                        yield _with(changed, t, b._replace(devices=second))


def _split(groups: Groups, s: int, rest: tuple[int, ...], d: int) -> Iterator[Groups]:
    """Gives the first or the last part of a stage to `d` alone, the other part to `rest`."""
    group = groups[s]
    size = group.end - group.first
    for part in sorted({1, size // 4, size // 2} - {0}):
        if part < size:
            cut = group.first + part
            yield (
                *groups[:s], Group(group.first, cut, (d,)), Group(cut, group.end, rest),
                *groups[s + 1 :],
            )  # fmt: skip
            cut = group.end - part
            yield (
                *groups[:s], Group(group.first, cut, rest), Group(cut, group.end, (d,)),
                *groups[s + 1 :],
            )  # fmt: skip


def _with(values: Sequence[Item], position: int, value: Item) -> tuple[Item, ...]:
    return (*values[:position], value, *values[position + 1 :])


def descend(
    start: Layout,
    value_of: Callable[[Layout], float],
    moves_of: Callable[[Layout], list[Move]],
    apply: Callable[[Layout, Move], Layout | None],
    *,
    seed: int = 0,
) -> Layout:
    """Follows the first change that helps until none does, or `value_of` gives up.

    Changes are tried in an order drawn from `seed`: the same seed gives the same way down.

    Args:
        start: With a finite value.
        value_of: What to minimise; -inf ends the descent.
        moves_of: The changes of a layout.
        apply: Makes a change; None if it can not be.
        seed: Of the order.
    """
    random, here, value = Random(seed), start, value_of(start)
    while True:
        moves = moves_of(here)
        random.shuffle(moves)
        for move in moves:
            option = apply(here, move)
            if option is None:
                continue
            found = value_of(option)
            if found == -inf:
                return here
            if found < value * (1 - 1e-9):
                here, value = option, found
                break
        else:
            return here
