"""The parts of a report below the drawings of cluster and plan; each says what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from dora.report.charts import (
    Mark,
    Point,
    distribution_chart,
    near,
    pareto_chart,
    sequence_chart,
    use_chart,
)
from dora.report.facts import (
    Bound,
    Joules,
    bounds,
    bubble,
    error_of,
    exposed_s,
    measured_energy,
    measured_j,
    peaks,
    percentile,
    predicted_energy,
    predicted_j,
    predicted_s,
    process_peaks,
    provenance,
    step_word,
    times_s,
    whole_prediction,
)
from dora.report.gantt import Panel, gantt_drawing
from dora.report.markup import Markup, joined, line, note, table, tag
from dora.report.plan import placement_text, plan_text
from dora.report.quantities import joules, num_bytes, percent, rate, seconds, signed
from dora.report.traffic import Use, uses
from dora.spec import Plan, Run, Timeline

_PARTS = (("busy", "computing"), ("idle", "waiting"), ("radio", "radio or port"))


def missing(sentence: str) -> Markup:
    """Returns what stands in the place of something that the run does not hold."""
    return tag("p", sentence, class_="gone")


def front_section(run: Run) -> Markup:
    """Returns the plans that the planner kept, in a chart and a table."""
    priced = [plan for plan in run.front if plan.cost is not None]
    if not priced:
        return missing("The planner's other plans were not saved with this run.")
    numbers = {i: _is_same(plan, run.plan) for i, plan in enumerate(priced)}
    word = step_word(run)
    points = [
        Point(
            plan.cost.makespan_s, plan.cost.energy_j, f"{i + 1}, ran" if numbers[i] else f"{i + 1}",
            f"{plan_text(plan)}: predicted {seconds(plan.cost.makespan_s)}, "
            f"{joules(plan.cost.energy_j)}",
            "ran" if numbers[i] else "front",
        )
        for i, plan in enumerate(priced)
        if plan.cost is not None
    ]  # fmt: skip
    times, energy = times_s(run), measured_j(run)
    if times and energy is not None:
        title = f"the run: {seconds(median(times))} measured, {joules(energy)}"
        points.append(Point(median(times), energy, "measured", title, "measured"))
    chart = pareto_chart(points, _time_bounds(run)) if len(points) > 1 else Markup()
    if len(priced) == 1:
        text = "Only one plan was kept: no other is better in time, in energy or in memory."
    else:
        text = (
            f"The {len(priced)} plans that the planner kept, as trade-offs of time, energy, memory."
        )
    if not any(numbers.values()):
        text += " The plan that ran is not among them."
    key = "Circles: predicted time and modelled energy of each plan."
    if len(points) > len(priced):
        origin = provenance(measured_energy(run))
        key += f" Diamond: this run, its time measured, its energy {origin}."
    listed = _front_table(priced, numbers, word)
    return joined(tag("p", text), joined(chart, note(key)) if chart else "", listed)


def _is_same(plan: Plan, other: Plan) -> bool:
    """Tells whether two plans place and cut alike; cost and order of transfers are details."""
    fields = ("stages", "num_microbatches", "codecs", "warmup", "schedule_kind")
    return all(getattr(plan, field) == getattr(other, field) for field in fields)


def _front_table(plans: Sequence[Plan], ran: dict[int, bool], word: str) -> Markup:
    rows = []
    for i, plan in enumerate(plans):
        if plan.cost is None:
            continue
        peak = max((m.peak_bytes for m in plan.cost.memory), default=0)
        rows.append(
            (
                str(i + 1),
                joined(placement_text(plan), tag("b", " (ran)") if ran[i] else ""),
                str(plan.num_microbatches),
                seconds(plan.cost.makespan_s),
                joules(plan.cost.energy_j),
                num_bytes(peak) if peak else "not known",
            )
        )
    columns = (
        "", "plan [blocks]", "micro-batches", f"{word}, predicted", "energy, modelled",
        "largest peak memory",
    )  # fmt: skip
    return table(columns, rows, class_="plans")


def _time_bounds(run: Run) -> list[Mark]:
    return [
        Mark(b.allowed, f"bound {seconds(b.allowed)}", "bound")
        for b in bounds(run)
        if b.field in ("step_s", "latency_s")
    ]


def time_section(run: Run) -> Markup:
    """Returns both timelines above each other, and the figures side by side."""
    word = step_word(run)
    panels, lacking = [], []
    for source, timeline in (("Predicted", run.predicted), ("Measured", run.measured)):
        if timeline is not None and timeline.spans:
            panels.append(Panel(_panel_title(source, timeline, run), timeline))
        elif timeline is None:
            lacking.append(missing(f"No prediction was saved with this run: {_no_timeline(run)}"))
        else:
            lacking.append(missing(f"{source}: the timeline holds nothing, so none is drawn."))
    drawn = gantt_drawing(panels, run.plan) if panels else Markup()
    return joined(drawn, lacking, tag("h3", f"One {word} in figures"), _figures(run))


def _no_timeline(run: Run) -> str:
    if run.plan.cost is None:
        return "only what was measured is drawn."
    return "only what was measured is drawn, and predicted numbers are the planner's."


def _panel_title(source: str, timeline: Timeline, run: Run) -> str:
    title = f"{source}: {seconds(timeline.makespan_s)}"
    if source == "Measured" and run.times_s:
        title += f", one {step_word(run)}; the median of all {len(run.times_s)} is "
        title += seconds(median(run.times_s))
    if source == "Predicted" and run.workload.kind == "generate":
        title += ", the prompt; each further token is one more pass"
    return title


def _figures(run: Run) -> Markup:
    times, word, predicted = times_s(run), step_word(run), whole_prediction(run)
    step = "time per step" if word == "step" else "latency"
    middle = median(times) if times else None
    rows = [_row(f"{step}, median", predicted_s(run), middle, seconds)]
    rows.append(
        _row(
            "exposed communication",
            exposed_s(predicted) if predicted else None,
            exposed_s(run.measured),
            seconds,
            absent="sends are not in the timeline",
        )
    )
    rows.append(
        _row(
            "bubble", bubble(predicted) if predicted else None, bubble(run.measured), percent,
            is_share=True,
        )
    )  # fmt: skip
    found = measured_energy(run)
    rows.append(
        _row(
            f"energy per {word}", predicted_j(run), measured_j(run), joules,
            notes=("modelled", provenance(found)),
        )
    )  # fmt: skip
    for name, (before, after) in peaks(run).items():
        limit = num_bytes(run.cluster.device(name).memory_bytes)
        rows.append(_row(f"peak memory, {name} (has {limit})", before, after, num_bytes))
    for name, size in process_peaks(run).items():
        rows.append(_row(f"with Python and its libraries, {name}", None, size, num_bytes))
    columns = ("", "predicted", "measured", "error of the prediction")
    return table(columns, rows, class_="figures")


def _row(
    name: str,
    predicted: float | None,
    measured: float | None,
    written: Callable[[float], str],
    *,
    notes: tuple[str, str] = ("", ""),
    absent: str = "not measured",
    is_share: bool = False,
) -> tuple[str, ...]:
    error = error_of(predicted, measured)
    shown = signed(error) if error is not None else ""
    if is_share and predicted is not None and measured is not None:
        points = round((predicted - measured) * 100)
        shown = f"{points:+d} points" if points else "0 points"
    return (
        name,
        _noted(written(predicted), notes[0]) if predicted is not None else "not predicted",
        _noted(written(measured), notes[1]) if measured is not None else absent,
        shown,
    )


def _noted(value: str, remark: str) -> Markup:
    return joined(value, tag("br"), tag("small", remark)) if remark else joined(value)


def traffic_section(run: Run) -> Markup:
    """Returns how much of every medium was used: a chart for each that carried something."""
    if not run.cluster.media:
        return missing("The cluster has no network, so there is nothing to use.")
    found = uses(run)
    if not found:
        return missing(
            "Traffic was not counted, and without a predicted timeline none can be expected."
        )
    if found[0].source == "measured":
        text = "Measured: bytes carried, as a share of the rate of the medium, over the whole run."
    else:
        text = (
            f"Predicted, since traffic was not counted: share of the time in which a message is "
            f"under way, over one {step_word(run)}."
        )
    quiet = [use.medium for use in found if not use.mean]
    known = {use.medium for use in found}
    uncounted = [medium.name for medium in run.cluster.media if medium.name not in known]
    parts = [
        tag("p", f"{text} Dashed: the mean."),
        tag("div", (_use(use, run) for use in found if use.mean), class_="uses"),
    ]
    if quiet:
        parts.append(note(f"Carried nothing: {', '.join(quiet)}."))
    if uncounted:
        parts.append(note(f"Not counted: {', '.join(uncounted)}."))
    return joined(parts)


def _use(use: Use, run: Run) -> Markup:
    limit = next((m.rate_bytes_per_s for m in run.cluster.media if m.name == use.medium), None)
    caption = f"{use.source}: mean {percent(use.mean)}"
    if use.source == "predicted":
        caption += " of the time"
    elif limit:
        caption += f" of {rate(limit)}"
    if use.carried_bytes is not None:
        caption += f", {num_bytes(use.carried_bytes)} in all"
    head = tag("figcaption", tag("b", use.medium), tag("br"), caption)
    return tag("figure", head, use_chart(use))


def energy_section(run: Run) -> Markup:
    """Returns the joules of every device, predicted and measured, each with its origin."""
    before = {one.device: one for one in predicted_energy(run)}
    after = {one.device: one for one in measured_energy(run)}
    peaks_j = {n: max(_total(before, n), _total(after, n)) for n in run.plan.devices}
    most = max(peaks_j.values())
    # A bar below one pixel shows nothing: such as the radio of a device that is left out.
    names = [n for n, peak_j in peaks_j.items() if peak_j > 0.002 * most]
    if not names:
        return missing(
            "No energy is known: no meter ran, nobody counted activity, and none was predicted."
        )
    parts = [
        note("Not measured: no meter ran, and nobody counted activity.") if not after else Markup(),
        note(_no_prediction(run)) if not before else Markup(),
        _energy_legend([*before.values(), *after.values()]),
        tag("div", (_energy_of(n, before, after, most) for n in names), class_="energy"),
    ]
    quiet = [name for name in run.plan.devices if name not in names]
    if quiet:
        parts.append(note(f"Below {joules(0.002 * most)}: {', '.join(quiet)}."))
    return joined(tag("p", f"Joules per {step_word(run)}."), parts)


def _no_prediction(run: Run) -> str:
    total = predicted_j(run)
    if total is None:
        return "Not predicted."
    return f"Predicted only for all devices together: {joules(total)}, by the planner."


def _total(found: dict[str, Joules], name: str) -> float:
    return found[name].total if name in found else 0.0


def _energy_legend(found: Sequence[Joules]) -> Markup:
    items = []
    if any(one.parts for one in found):
        items += list(_PARTS)
    if any(one.parts is None for one in found):
        items.append(("whole", "not split"))
    return tag(
        "ul",
        (tag("li", tag("span", class_=f"swatch {class_}"), name) for class_, name in items),
        class_="legend",
    )


def _energy_of(
    name: str, before: dict[str, Joules], after: dict[str, Joules], most: float
) -> Markup:
    rows = [
        _bar(source, found[name], most)
        for source, found in (("predicted", before), ("this run", after))
        if name in found
    ]
    return tag("div", tag("h3", name), rows)


def _bar(source: str, one: Joules, most: float) -> Markup:
    parts = list(zip(_PARTS, one.parts, strict=True)) if one.parts else []
    pieces = [(class_, f"{name} {joules(value)}", value) for (class_, name), value in parts]
    pieces = pieces or [("whole", joules(one.total), one.total)]
    return tag(
        "div",
        tag("span", source, class_="what"),
        tag(
            "span",
            (
                tag("span", class_=f"part {class_}", title=title, style=f"width:{v / most:.2%}")
                for class_, title, v in pieces
            ),
            class_="track",
        ),
        tag("span", tag("b", joules(one.total)), f" {one.provenance}", class_="value"),
        class_=f"bar {source.replace(' ', '-')}",
    )


def quality_section(run: Run) -> Markup:
    """Returns every bound with what became of it, and the times of all steps."""
    judged, times, word = bounds(run), times_s(run), step_word(run)
    parts: list[Markup] = []
    if judged:
        columns = ("bound", "asked", "predicted", "measured", f"{word}s that keep it", "")
        parts.append(table(columns, (_bound_row(bound) for bound in judged), "bounds"))
    else:
        parts.append(missing("The run was given no bound; it minimised " + run.qoe.objective + "."))
    if len(times) < 2:
        parts.append(missing(f"Fewer than two {word}s were timed, so there is no distribution."))
        return joined(parts)
    marks = _time_bounds(run)
    expected = predicted_s(run)
    if expected is not None:
        marks.append(Mark(expected, f"predicted {seconds(expected)}", "expected"))
    shown, level = near(marks, times), run.qoe.percentile
    parts += [
        tag("p", f"All {len(times)} {word}s, measured: median {seconds(median(times))}, "
            f"95th percentile {seconds(percentile(times, 95))}, worst {seconds(max(times))}."),
        tag(
            "div",
            tag("div", distribution_chart(times, shown, level)),
            tag("div", sequence_chart(times, shown, word)),
            class_="charts",
        ),
        tag("ul", _mark_legend(shown), class_="legend"),
    ]  # fmt: skip
    parts += [note(f"Beyond the charts: {mark.label}.") for mark in marks if mark not in shown]
    return joined(parts)


def _bound_row(bound: Bound) -> Iterator[str]:
    state = {True: ("kept", "good"), False: ("broken", "bad"), None: ("not judged", "")}
    word, class_ = state[bound.is_kept]
    yield bound.title
    yield bound.asked
    yield bound.written(bound.predicted)
    yield bound.reached
    yield percent(bound.share) if bound.share is not None else ""
    yield joined(tag("b", word, class_=class_), tag("br"), tag("small", bound.how))


def _mark_legend(marks: Sequence[Mark]) -> Iterator[Markup]:
    names = {"bound": "bound of the QoE", "expected": "predicted"}
    yield tag("li", tag("span", class_="swatch solid measured"), "measured")
    for class_ in dict.fromkeys(mark.class_ for mark in marks):
        stroke = line(0, 7, 20, 7, class_)
        yield tag("li", tag("svg", stroke, viewBox="0 0 20 14", class_="swatch"), names[class_])
