"""The screen of `dora top`: how a running job is doing, from what its ranks have written."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dora import views
from dora.errors import SpecError
from dora.files import load
from dora.spec import Cluster, Happening, Status

# A rank that has not written for so many of its periods is not just late.
_SILENT_PERIODS = 3.0
# Below that many columns a table leaves out what can be spared.
_WIDE = 100
_MAX_LINKS, _MAX_EVENTS = 12, 5
_KINDS = {"train": "training", "infer": "serving", "generate": "generating", None: "starting"}
_STYLES = {"running": "green", "idle": "cyan", "over": "dim"}


class Heard(NamedTuple):
    """What a rank has said, and for how long it has been silent since.

    Attributes:
        is_gone: Its process was on this machine and is not there any more.
    """

    status: Status
    age_s: float
    is_gone: bool

    @property
    def is_open(self) -> bool:
        """Whether the rank may still be at work."""
        return self.status.state in ("running", "idle") and not self.is_gone

    @property
    def is_silent(self) -> bool:
        """Whether it should have been heard of since."""
        return self.is_open and self.age_s > _SILENT_PERIODS * self.status.period_s


def hear(place: Path) -> list[Heard]:
    """Reads what the ranks of a job have said.

    Args:
        place: Folder of statuses, or of a run with a folder `status` in it, or one status.

    Raises:
        SpecError: There is none, or one is not valid.
    """
    files = _files(place)
    if not files:
        raise SpecError(
            f"{place}: given no rank-N.json, allowed: the folder that a job got as DORA_STATUS, or "
            "one of these files"
        )
    heard = [_hear(file) for file in files]
    latest = max(heard, key=lambda one: -one.age_s)
    of_job = range(len(latest.status.plan.devices))  # others are left from a larger job
    return sorted(
        (one for one in heard if one.status.rank in of_job), key=lambda one: one.status.rank
    )


def cluster_beside(place: Path) -> Cluster | None:
    """Returns the cluster that a testbed or the demo left with the run, if there is one."""
    folder = place if place.is_dir() else place.parent
    for file in (folder / "cluster.json", folder.parent / "cluster.json"):
        if file.exists():
            return load(Cluster, file)
    return None


def is_over(heard: Sequence[Heard]) -> bool:
    """Returns whether no rank is at work any more."""
    return not any(one.is_open for one in heard)


def frame(
    heard: Sequence[Heard],
    *,
    width: int,
    cluster: Cluster | None = None,
    bound_s: float | None = None,
) -> Group:
    """Returns the screen.

    Args:
        heard: One or more, in the order of ranks.
        width: Columns of the terminal.
        cluster: What links should carry.
        bound_s: What a call may take, where the job does not know.
    """
    leader = _leader(heard)
    parts: list[RenderableType] = [_title(heard, leader), *_facts(leader, bound_s), *_tokens(heard)]
    parts += [Text(), _ranks(heard, leader, width)]
    links = _links(heard, cluster, width)
    parts += [Text(), links] if links.row_count else []
    happened = list(_events(leader))
    parts += [Text(), Text("events", style="bold"), *happened] if happened else []
    return Group(*parts)


def last_decision(file: Path) -> Text | None:
    """Returns the last line of the adapter's log, if there is one that can be read."""
    try:
        decision = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["decision"]
        return Text(f"adapter    {decision['kind']}: {decision['reason']}")
    except (OSError, ValueError, LookupError, TypeError):
        return None


# ------------------------------------------------------------ reading


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(place.glob("rank-*.json")) or sorted(place.glob("status/rank-*.json"))


def _hear(file: Path) -> Heard:
    status = load(Status, file)
    # By the clock of the file system: those of other machines may be off.
    age_s = max(time.time() - file.stat().st_mtime, 0.0)
    return Heard(status, age_s, status.host == socket.gethostname() and not _is_alive(status))


def _is_alive(status: Status) -> bool:
    try:
        process = psutil.Process(status.process)
        is_same = bool(abs(process.create_time() - status.started_s) < 1.0)
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _leader(heard: Sequence[Heard]) -> Status:
    """Returns who knows best: the lowest rank that is at work and heard of, else the latest."""
    able = [one for one in heard if one.is_open and not one.is_silent]
    members = [one for one in able if one.status.rank in one.status.members]
    return (members or able or [min(heard, key=lambda one: one.age_s)])[0].status


# ------------------------------------------------------------ job


def _title(heard: Sequence[Heard], leader: Status) -> Text:
    age_s = min(one.age_s for one in heard)
    text = Text("dora top", style="bold")
    what = _KINDS[leader.kind]
    num = len(leader.plan.devices)
    text.append(f"  {what}, {len(leader.members)} of {num} devices", style="not bold")
    if leader.num_calls and leader.kind != "generate":
        text.append(f", {_call(leader)} {leader.num_calls}", style="not bold")
    problem = next((one.status.problem for one in heard if one.status.problem), "")
    if problem:
        text.append(f"  FAILED: {problem.splitlines()[0]}", style="bold red")
    elif is_over(heard):
        text.append(f"  OVER, last heard {_ago(age_s)}", style="bold yellow")
    elif all(one.is_silent for one in heard if one.is_open):
        text.append(f"  SILENT, last heard {_ago(age_s)}", style="bold red")
    else:
        text.append(f", last heard {_ago(age_s)}", style="not bold")
    return text


def _facts(status: Status, bound_s: float | None) -> Iterator[Text]:
    yield Text(f"plan       {views.describe(status.plan)}")
    if status.kind == "generate":
        return
    yield Text(f"{_call(status):<10} {_time(status)}")
    bound_s = bound_s or status.bound_s
    if bound_s is None:
        yield Text("QoE        no bound is known; --bound-s SECONDS compares with one")
    elif status.recent_s:
        kept = sum(took_s <= bound_s for took_s in status.recent_s) / len(status.recent_s)
        is_met = 100 * kept >= status.percentile
        yield Text(
            f"QoE        {views.seconds(bound_s)} or less: kept by {kept:.0%} of the last "
            f"{len(status.recent_s)}, {'met' if is_met else 'MISSED'} "
            f"({status.percentile:g} % have to)",
            style="green" if is_met else "red",
        )


def _time(status: Status) -> str:
    """Returns the measured and the predicted time of a call, both always."""
    predicted = "predicted: unknown"
    if status.predicted_s:
        predicted = f"{views.seconds(status.predicted_s)} predicted"
    if not status.recent_s:
        return f"none measured yet, {predicted}"
    half_s = median(status.recent_s)
    if status.predicted_s:
        predicted += f" ({status.predicted_s / half_s - 1:+.0%})"
    late_s = sorted(status.recent_s)[math.ceil(0.95 * len(status.recent_s)) - 1]
    rate = f", {status.calls_per_s:.3g} per s" if status.calls_per_s else ""
    return (
        f"{views.seconds(half_s)} measured, {predicted}; 95 % within {views.seconds(late_s)}{rate} "
        f"(last {len(status.recent_s)})"
    )


def _tokens(heard: Sequence[Heard]) -> Iterator[Text]:
    """Yields what the rank says that leads `generate`, if there is one."""
    told = [one.status.tokens for one in heard if one.status.tokens is not None]
    for tokens in sorted(told, key=lambda tokens: -tokens.in_flight)[:1]:
        text = f"{tokens.tokens_per_s:.3g} per s"
        for name, times in (("first", tokens.first_s), ("each further", tokens.further_s)):
            if times is not None:
                half, late = map(views.seconds, times)
                text += f"; {name} after {half}, 95 % within {late}"
        yield Text(f"tokens     {text}")
        waiting = f", {tokens.waiting} waiting" * (tokens.waiting > 0)
        ended = f"{tokens.num_requests} ended, {tokens.num_tokens} tokens in all"
        yield Text(f"requests   {tokens.in_flight} in flight{waiting}; {ended}")


def _call(status: Status) -> str:
    return "request" if status.kind == "infer" else "step"


def _ago(age_s: float) -> str:
    return f"{age_s:.0f} s ago" if age_s < 120 else f"{age_s / 60:.0f} min ago"


# ------------------------------------------------------------ ranks


def _ranks(heard: Sequence[Heard], leader: Status, width: int) -> Table:
    is_wide = width >= _WIDE
    table = _table("rank", "device", "blocks", "state", "compute", "wait", "send", "memory")
    if is_wide:
        for name in ("model, predicted", "sent"):
            table.add_column(name, justify="right")
    named = {one.status.rank: one for one in heard}
    for rank, device in enumerate(leader.plan.devices):
        one = named.get(rank)
        role = _role(leader, rank, is_wide)
        if one is None:
            state = "no status here" if rank in leader.members else "lost"
            table.add_row(str(rank), device, role, state)
            continue
        table.add_row(str(rank), device, role, _state(one, leader), *_use(one.status, is_wide))
    return table


def _role(leader: Status, rank: int, is_wide: bool) -> str:
    placement = leader.plan.placement(rank)
    if placement is None or rank not in leader.members:
        return "-"
    stage, replica = placement
    blocks = f"{leader.plan.stages[stage].first_block}-{leader.plan.stages[stage].last_block}"
    share = leader.plan.stages[stage].replicas[replica].share
    return f"{blocks}, stage {stage}" + f" ({share:.0%})" * (share < 1) if is_wide else blocks


def _state(one: Heard, leader: Status) -> Text:
    status = one.status
    if leader.rank != status.rank and status.rank not in leader.members:
        has_left = any(e.kind == "leave" and status.device in e.devices for e in leader.events)
        return Text("left" if has_left else "lost", style="yellow" if has_left else "bold red")
    if status.state == "failed":
        return Text("failed", style="bold red")
    if one.is_gone and status.state != "over":
        return Text("gone", style="bold red")
    if one.is_silent:
        return Text(f"silent {one.age_s:.0f} s", style="red")
    if status.in_call_s is not None and status.in_call_s > 2 * status.period_s:
        usual_s = median(status.recent_s) if status.recent_s else math.inf
        if status.in_call_s > 2 * usual_s:
            return Text(f"in a call, {status.in_call_s:.0f} s", style="yellow")
    return Text(status.state, style=_STYLES[status.state])


def _use(status: Status, is_wide: bool) -> list[str]:
    shares = status.shares
    texts = ["-", "-", "-"]
    if shares is not None:
        sending = "-" if shares.sending is None else f"{shares.sending:.0%}"
        texts = [f"{shares.computing:.0%}", f"{shares.waiting:.0%}", sending]
    texts.append(views.num_bytes(status.memory_bytes))
    if is_wide:
        sent = sum(link.sent_bytes for link in status.links)
        messages = sum(link.messages for link in status.links)
        texts.append("-" if status.peak_bytes is None else views.num_bytes(status.peak_bytes))
        texts.append(f"{views.num_bytes(sent)} in {messages}" if status.links else "-")
    return texts


# ------------------------------------------------------------ links, events


def _links(heard: Sequence[Heard], cluster: Cluster | None, width: int) -> Table:
    """Returns the links that carried something, those that carried most first."""
    rows = [(one.status, link) for one in heard for link in one.status.links if link.sent_bytes]
    rows.sort(key=lambda row: -row[1].sent_bytes)
    table = _table("link", "measured", "cluster file", "of it")
    if width >= _WIDE:
        for name in ("round trip", "sent", "messages"):
            table.add_column(name, justify="right")
    for status, link in rows[:_MAX_LINKS]:
        src, dst = status.device, status.plan.devices[link.peer]
        rate, given = link.rate_bytes_per_s, _given_bytes_per_s(cluster, src, dst)
        cells = [f"{src} to {dst}" + " (down)" * (not link.is_up)]
        cells += [_mbit(rate) if rate else "never busy", _mbit(given) if given else "-"]
        cells.append(f"{rate / given:.0%}" if rate and given else "-")
        if width >= _WIDE:
            trip_s = link.round_trip_s
            cells.append(views.seconds(trip_s) if trip_s is not None else "-")
            cells += [views.num_bytes(link.sent_bytes), str(link.messages)]
        table.add_row(*cells)
    return table


def _given_bytes_per_s(cluster: Cluster | None, src: str, dst: str) -> float | None:
    """Returns what a link carries by the cluster file: what its narrowest medium leaves it."""
    links = cluster.links if cluster is not None else ()
    link = next((one for one in links if (one.src, one.dst) == (src, dst)), None)
    if cluster is None or link is None or not link.media:
        return None
    rates = {medium.name: medium.rate_bytes_per_s for medium in cluster.media}
    return min(rates[name] / link.media.count(name) for name in link.media)


def _mbit(rate_bytes_per_s: float) -> str:
    return f"{rate_bytes_per_s * 8e-6:.3g} Mbit/s"


def _events(leader: Status) -> Iterator[Text]:
    for event in reversed(leader.events[-_MAX_EVENTS:]):
        yield Text(f"{time.strftime('%H:%M:%S', time.localtime(event.at_s))}  {_told(event)}")


def _told(event: Happening) -> str:
    who = f" {', '.join(event.devices)}" if event.devices else ""
    facts = [f"before call {event.call}", f"took {views.seconds(event.took_s)}"]
    facts += [f"{event.lost_steps} steps undone"] if event.lost_steps else []
    facts += [f"got {views.num_bytes(event.num_bytes)}"] if event.num_bytes else []
    text = f": {event.text}" if event.text else ""
    return f"{event.kind}{who} ({', '.join(facts)}){text}"


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for column in columns:
        is_text = column in ("device", "blocks", "state", "link")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table
