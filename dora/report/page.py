"""Makes a report of a Run: one HTML page with all its drawings in it, which loads nothing.

::

    Path("report.html").write_text(page(load(Run, "run/run.json")))
"""

from __future__ import annotations

from statistics import median

from dora.report.cluster import cluster_drawing
from dora.report.facts import (
    Bound,
    bounds,
    error_of,
    measured_energy,
    measured_j,
    percentile,
    predicted_j,
    predicted_s,
    provenance,
    step_word,
    times_s,
)
from dora.report.markup import Markup, joined, note, tag
from dora.report.plan import plan_drawing, plan_text
from dora.report.quantities import joules, percent, seconds, signed
from dora.report.sections import (
    energy_section,
    front_section,
    quality_section,
    time_section,
    traffic_section,
)
from dora.report.style import STYLE
from dora.spec import Run

_WORK = {"train": "Training", "infer": "Inference", "generate": "Generation"}


def page(run: Run) -> str:
    """Returns the HTML of a report."""
    sections = (
        ("Cluster", cluster_drawing(run)),
        ("Plan", plan_drawing(run)),
        ("Plans to choose from", front_section(run)),
        ("Predicted and measured", time_section(run)),
        ("Links", traffic_section(run)),
        ("Energy by device", energy_section(run)),
        ("Quality of experience", quality_section(run)),
    )
    body = tag(
        "main",
        _header(run),
        (tag("section", tag("h2", title), content) for title, content in sections),
        _footer(run),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: report of Dora"),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _header(run: Run) -> Markup:
    judged = bounds(run)
    return tag(
        "header",
        tag("h1", run.name),
        tag("p", _subject(run)),
        note(run.note) if run.note.strip() else "",
        _verdict(judged),
        tag("div", _tiles(run, judged), class_="tiles"),
    )


def _subject(run: Run) -> str:
    work = run.workload
    used = sum(len(stage.replicas) for stage in run.plan.stages)
    devices = f"{used} of {len(run.cluster.devices)} devices of {run.cluster.name}"
    size = f"batch {work.batch_size}"
    if work.kind == "generate":
        size += f", {work.prompt_tokens} tokens in and {work.new_tokens} out"
    return f"{_WORK[work.kind]}, {size}, on {devices}: {plan_text(run.plan)}."


def _verdict(judged: list[Bound]) -> Markup:
    """Returns whether the QoE held, in one line."""
    class_, word, rest = _judgement(judged)
    line = tag("p", tag("b", word, class_="word"), rest)
    return tag("div", line, class_=f"verdict {class_}".strip())


def _judgement(judged: list[Bound]) -> tuple[str, str, str]:
    """Returns the class of the verdict, its word, and the rest of the sentence."""
    if not judged:
        return "", "No bound was asked for", ", so there is none to keep or break."
    broken = [bound for bound in judged if bound.is_kept is False]
    open_ = [bound.title for bound in judged if bound.is_kept is None]
    rest = f" Not judged: {', '.join(open_)}." if open_ else ""
    if broken:
        texts = (f"{b.title} {b.reached}, asked {b.asked}" for b in broken)
        return "bad", "QoE broken", f": {'; '.join(texts)}.{rest}"
    kept = [bound for bound in judged if bound.is_kept]
    if not kept:
        return "", "QoE not judged", f": the run measured nothing that is bounded.{rest}"
    texts = (f"{b.title} {b.reached}, asked {b.asked}" for b in kept)
    return "good", "QoE kept", f": {'; '.join(texts)}.{rest}"


def _tiles(run: Run, judged: list[Bound]) -> list[Markup]:
    times, word, expected = times_s(run), step_word(run), predicted_s(run)
    middle = median(times) if times else None
    error = error_of(expected, middle)
    tiles = [
        _tile(
            f"time per {word}, measured",
            seconds(middle) if middle is not None else "not known",
            _spread(times, word),
        ),
        _tile(
            f"time per {word}, predicted",
            seconds(expected) if expected is not None else "not known",
            f"{signed(error)} against the measured median" if error is not None else "",
        ),
    ]
    for bound in judged:
        if bound.share is not None:
            asked = f"asked {bound.asked} for {percent(run.qoe.percentile / 100)} of the {word}s"
            state = tag("span", percent(bound.share), class_="good" if bound.is_kept else "bad")
            tiles.append(_tile(f"{word}s within the bound, measured", state, asked))
    found, before = measured_energy(run), predicted_j(run)
    total = measured_j(run)
    later = f"; predicted {joules(before)}" if before is not None else ""
    if total is not None:
        tiles.append(_tile(f"energy per {word}", joules(total), provenance(found) + later))
    elif before is not None:
        tiles.append(_tile(f"energy per {word}, predicted", joules(before), "not measured"))
    return tiles


def _spread(times: tuple[float, ...], word: str) -> str:
    if len(times) < 2:
        return f"one {word}" if times else ""
    low, high = seconds(percentile(times, 5)), seconds(percentile(times, 95))
    return f"median of {len(times)}; 5th to 95th percentile {low} to {high}"


def _tile(what: str, value: str, more: str) -> Markup:
    return tag(
        "div",
        tag("p", what, class_="what"),
        tag("p", value, class_="value"),
        tag("p", more, class_="more"),
        class_="tile",
    )


def _footer(run: Run) -> Markup:
    lines = [
        "Measured: read from a clock, a counter or a meter while the plan ran. Modelled from "
        "measured activity: counted seconds and bytes times the powers of the cluster file. "
        "Predicted and modelled: by the simulator, from block profiles and the cluster file.",
        "In both timelines bubbles and exposed communication are means over the devices that "
        "compute, and of each message only the sending end counts.",
    ]
    if run.note.strip():
        lines.insert(0, f"How it ran: {run.note.strip()}")
    lines.append(
        "The file trace.json in the folder of the run holds both timelines for ui.perfetto.dev."
    )
    return tag("footer", joined(tag("p", one) for one in lines))
