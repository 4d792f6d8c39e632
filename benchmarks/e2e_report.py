"""What `bench_e2e.py` shows of its cells, and the bounds that it is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

from common import Metric, Row, Samples, Table
from e2e_plans import DDP, DORA, RELAXED, RIVALS, THRIFTY, TORCH_PIPELINE

from dora.report.facts import exposed_s
from dora.spec import Timeline
from dora.views import describe

if TYPE_CHECKING:
    from bench_e2e import Cell, Result

CONTENDED = ("smart-home-1", "smart-home-2", "traffic")
# Devices that hold less are mostly buffers of the allocator.
LEAST_BYTES = 16 << 20


def show(cell: Cell) -> None:
    """Prints one line per contender."""
    title = f"{cell.scenario} {cell.task.name} (network x{cell.network:.1f})"
    columns = ("ms", "predicted", "as fast as then", "J modelled", "plan")
    table = Table((title, *columns), width=(58, 20))
    for result in cell.results:
        contender = result.contender
        table.line(
            contender.name,
            str(Samples([1e3 * t for t in result.times_s])),
            _beside(result, contender.predicted),
            _beside(result, result.predicted_now),
            f"{median(result.energy_j):.3g}",
            "  " + (describe(contender.plan) if contender.plan else ""),
        )


def _beside(result: Result, predicted: Timeline | None) -> str:
    if predicted is None:
        return ""
    return f"{1e3 * predicted.makespan_s:.0f} ({error(result, predicted):+.0%})"


def error(result: Result, predicted: Timeline) -> float:
    """Returns a prediction of a plan's time over the measured median, less one."""
    return predicted.makespan_s / median(result.times_s) - 1


def rows(cell: Cell) -> Iterator[Row]:
    """Yields the lines of the result file."""
    case = f"{cell.scenario} {cell.task.name}"
    for result in cell.results:
        contender, predicted = result.contender, result.contender.predicted
        values: dict[tuple[str, str], list[float]] = {
            ("measured_time", "s"): result.times_s,
            ("energy_modelled_from_measured_activity", "J"): result.energy_j,
        }
        if predicted is not None:
            values["predicted_time", "s"] = [predicted.makespan_s]
            values["predicted_energy", "J"] = [predicted.energy_j]
            exposed = exposed_s(predicted)
            values["predicted_exposed_communication", "s"] = [] if exposed is None else [exposed]
        if result.predicted_now is not None:
            now_s = result.predicted_now.makespan_s
            values["predicted_time_as_fast_as_measured", "s"] = [now_s]
            for name in result.slowdowns[0]:
                values[f"slowdown_since_profile {name}", "1"] = [s[name] for s in result.slowdowns]
        if result.timeline is not None:
            exposed = exposed_s(result.timeline)
            values["measured_exposed_communication", "s"] = [] if exposed is None else [exposed]
        if result.in_time is not None:
            values["frames_in_time", "1"] = [result.in_time]
        for device, expected, peak in result.memory:
            values[f"predicted_memory {device}", "B"] = [expected]
            values[f"measured_memory {device}", "B"] = [peak]
        for (metric, unit), samples in values.items():
            if samples:
                yield Row(case, contender.name, metric, unit, Samples(samples))


# ------------------------------------------------------------ bounds


def bounds(cells: list[Cell]) -> dict[str, Metric]:
    """Returns what the benchmark promises, and what comes with it."""
    gains = {(cell.scenario, cell.task.name): gain(cell) for cell in cells}
    contended = [value for (name, _), value in gains.items() if name in CONTENDED]
    results = [r for cell in cells for r in cell.results]
    errors = [abs(error(r, p)) for r in results if (p := r.contender.predicted)]
    errors_now = [abs(error(r, p)) for r in results if (p := r.predicted_now)]
    memory = [abs(m / p - 1) for cell in cells for p, m in [largest(cell)] if p >= LEAST_BYTES]
    saved = [value for cell in cells if (value := energy_saved(cell)) is not None]
    found = {
        "cells_slower_than_best": _at_most(sum(map(is_slower, cells)), 0),
        "gain_over_best_contended": _at_least(_mean(contended), 1.3),
        "gain_over_best": _info(_mean(gains.values())),
        "prediction_error_median": _at_most(Samples(errors).median, 0.10),
        "prediction_error_p95": _at_most(Samples(errors).percentile(95), 0.20),
        "prediction_error_as_fast_as_then_median": _info(Samples(errors_now).median),
        "prediction_error_as_fast_as_then_p95": _info(Samples(errors_now).percentile(95)),
        "memory_error_most": _at_most(max(memory, default=0.0), 0.10),
        "energy_saved_median": _info(median(saved) if saved else None),
        "energy_saved_most": _info(max(saved, default=None)),
        "gain_of_planner": _info(_mean(filter(None, map(planner_gain, cells)))),
        "gain_of_engine": _info(_mean(engine_gains(cells))),
        "gain_of_order": _info(_mean(filter(None, map(order_gain, cells)))),
    }
    for rival in (*RIVALS, TORCH_PIPELINE, DDP):
        ratios = [r for cell in cells if (r := over(cell, rival)) is not None]
        if ratios:
            found[f"over {rival}: least"] = _info(min(ratios))
            found[f"over {rival}: mean"] = _info(_mean(ratios))
            found[f"over {rival}: most"] = _info(max(ratios))
    return found


def _ours(cell: Cell, planner: str = DORA, way: str = "engine") -> Result | None:
    for result in cell.results:
        if planner in result.contender.planners and result.contender.over == way:
            return result
    return None


def _time(result: Result) -> float:
    return median(result.times_s)


def _rivals(cell: Cell) -> list[Result]:
    """Returns all that are not Dora's alone."""
    ours = {DORA, THRIFTY}
    return [r for r in cell.results if set(r.contender.planners) - ours]


def gain(cell: Cell) -> float:
    """Returns the time of the best rival, whatever it runs over, over that of Dora."""
    mine = _ours(cell)
    assert mine is not None
    return min(map(_time, _rivals(cell))) / _time(mine)


def is_slower(cell: Cell) -> bool:
    """Returns whether some rival is faster beyond the spread of both."""
    mine = _ours(cell)
    assert mine is not None
    best = min(_rivals(cell), key=_time)
    return Samples(best.times_s).p80 < Samples(mine.times_s).p20


def over(cell: Cell, rival: str) -> float | None:
    """Returns the time of a rival, over what it is fastest with, over that of Dora."""
    mine = _ours(cell)
    times = [_time(r) for r in cell.results if rival in r.contender.planners]
    return min(times) / _time(mine) if mine and times else None


def planner_gain(cell: Cell) -> float | None:
    """Returns the same with all plans on the engine."""
    mine = _ours(cell)
    times = [_time(r) for r in _rivals(cell) if r.contender.over == "engine"]
    return min(times) / _time(mine) if mine and times else None


def engine_gains(cells: Iterable[Cell]) -> Iterator[float]:
    """Yields gloo's time over the engine's, for every plan of several devices."""
    for cell in cells:
        by_name = {r.contender.name: r for r in cell.results}
        for result in cell.results:
            other = by_name.get(f"{' = '.join(result.contender.planners)} | gloo")
            if result.contender.over == "engine" and other is not None:
                yield _time(other) / _time(result)


def order_gain(cell: Cell) -> float | None:
    """Returns what Dora's plan takes without its order of transfers, over what it takes."""
    mine, bare = _ours(cell), _ours(cell, way="engine, first come")
    return _time(bare) / _time(mine) if mine and bare else None


def energy_saved(cell: Cell) -> float | None:
    """Returns the share of the best rival's joules that Dora saves within the same time."""
    mine, fast = _ours(cell, THRIFTY), _ours(cell)
    if mine is None or fast is None or fast.contender.predicted is None:
        return None
    limit_s = max(RELAXED * fast.contender.predicted.makespan_s, _time(mine))
    able = [median(r.energy_j) for r in _rivals(cell) if _time(r) <= limit_s]
    return 1 - median(mine.energy_j) / min(able) if able else None


def largest(cell: Cell) -> tuple[int, int]:
    """Returns (predicted, measured) bytes of the device that holds most."""
    memory = cell.results[0].memory
    return max(((expected, peak) for _, expected, peak in memory), default=(0, 0))


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return geometric_mean(given) if given else None


def _at_most(value: float, limit: float) -> Metric:
    return Metric(value, "1", f"<= {limit:g}", value <= limit)


def _at_least(value: float | None, limit: float) -> Metric:
    return Metric(value, "1", f">= {limit:g}", None if value is None else value >= limit)


def _info(value: float | None) -> Metric:
    return Metric(value, "1", "", None)
