"""`dora report`: the page of a run, its numbers, its command and its looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from dora import catalog
from dora.cli_report import report_command, write_report
from dora.errors import SpecError
from dora.files import save
from dora.planner import predict, step_costs
from dora.report import page
from dora.report.facts import (
    bounds,
    exposed_s,
    measured_energy,
    percentile,
    predicted_energy,
    total_j,
)
from dora.report.quantities import digits, log_ticks, ordinal, seconds, ticks, with_unit
from dora.report.traffic import uses
from dora.scheduler import build_schedule
from dora.simulator import device_j, simulate, to_traces
from dora.spec import (
    Activity,
    Cluster,
    Cost,
    Device,
    Energy,
    Link,
    Medium,
    Plan,
    QoE,
    Replica,
    Run,
    Span,
    Stage,
    Timeline,
    Traffic,
    Usage,
    Workload,
)

WORKLOAD = Workload(batch_size=24, num_microbatches=6)
PROFILE = catalog.model_profile("mobilenet-v2", kind="train", microbatch_sizes=[4, 24])


def cluster_of(names: list[str], ports: int = 2) -> Cluster:
    """The last `ports` devices have ports of their own, the others share one channel."""
    devices = [
        Device(
            name=name, kind="board", flops_per_s=1e12 * (1 + i), mem_bandwidth_bytes_per_s=5e10,
            memory_bytes=4_000_000_000, idle_w=2.0, busy_w=10.0 + i, tx_j_per_byte=1e-8,
            rx_j_per_byte=5e-9, battery_j=40_000 if i == 0 else None,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    wired = names[len(names) - ports :]
    media = [Medium(name="wifi", rate_bytes_per_s=3e7, latency_s=2e-3, contention=(1.0, 0.8))]
    for name in wired:
        media += [Medium(name=f"{name}.{way}", rate_bytes_per_s=1e8) for way in ("up", "down")]
    links = [
        Link(
            src=a,
            dst=b,
            media=(
                f"{a}.up" if a in wired else "wifi",
                f"{b}.down" if b in wired else "wifi",
            ),
        )
        for a in names
        for b in names
        if a != b
    ]
    return Cluster(name="home", devices=tuple(devices), media=tuple(media), links=tuple(links))


def plan_of(names: list[str], groups: list[list[str]], blocks: int = len(PROFILE.blocks)) -> Plan:
    """Stages with about equally many blocks, and equal shares."""
    edges = [blocks * i // len(groups) for i in range(len(groups) + 1)]
    stages = tuple(
        Stage(
            index=i, first_block=edges[i], last_block=edges[i + 1] - 1,
            replicas=tuple(Replica(device=name, share=1 / len(group)) for name in group),
        )
        for i, group in enumerate(groups)
    )  # fmt: skip
    return Plan(devices=tuple(names), stages=stages, num_microbatches=6)


def run_of(names: list[str], groups: list[list[str]], **fields) -> Run:
    """A run whose 'measurement' is a second simulation, of slower devices on a fair network."""
    cluster = cluster_of(names)
    profile = catalog.scale_to_cluster(PROFILE, cluster, training=True)
    plan = predict(profile, cluster, WORKLOAD, plan_of(names, groups))
    schedule, costs = (
        build_schedule(plan, training=True),
        step_costs(profile, cluster, WORKLOAD, plan),
    )
    slower = costs._replace(compute_s={key: 1.1 * s for key, s in costs.compute_s.items()})
    played = simulate(plan, schedule, slower, cluster, discipline="fair", start_s=7.0)
    step_s = played.makespan_s
    times = tuple(step_s * factor for factor in (1.0, 1.02, 0.98, 1.3, 1.01, 0.99, 1.0, 1.05))
    total_s = sum(times)
    usage = tuple(
        Usage(
            device=name, total_s=total_s, busy_s=8 * played.busy_s(rank, "compute"),
            sent_bytes=1_000_000, received_bytes=2_000_000,
        )
        for rank, name in enumerate(names)
    )  # fmt: skip
    traffic = tuple(
        Traffic(
            medium=m.name,
            rate_bytes_per_s=m.rate_bytes_per_s,
            at_s=(0.0, total_s / 4, total_s / 2, total_s),
            carried_bytes=(0, *(int(m.rate_bytes_per_s * total_s * x) for x in (0.1, 0.4, 0.5))),
        )
        for m in cluster.media
    )
    measured = Timeline(source="measured", num_ranks=len(names), spans=played.spans)
    given = {
        "name": "mobilenet at home",
        "cluster": cluster,
        "workload": WORKLOAD,
        "qoe": QoE(step_s=1.2 * step_s, percentile=75),
        "plan": plan,
        "front": (plan, predict(profile, cluster, WORKLOAD, plan_of(names, [[names[-1]]]))),
        "predicted": simulate(plan, schedule, costs, cluster),
        "measured": measured.model_copy(update={"memory": played.memory}),
        "times_s": times,
        "activity": Activity(usage=usage, traffic=traffic),
        "note": "a second simulation stands in for a measurement",
    }
    return Run(**{**given, **fields})


HOME = ["phone", "tablet", "laptop", "mini-pc", "desktop"]
GROUPS = [["tablet"], ["laptop", "mini-pc"], ["desktop"]]


@pytest.fixture(scope="module")
def run() -> Run:
    return run_of(HOME, GROUPS)


class Reader(HTMLParser):
    """Checks that every element is closed in order, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_startendtag(self, tag, attrs):
        assert tag in ("meta", "br")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def read(run: Run) -> Reader:
    reader = Reader()
    reader.feed(page(run))
    reader.close()
    assert not reader.open
    return reader


def text_of(run: Run) -> str:
    return re.sub(r"\s+", " ", " ".join(read(run).texts))


def test_page_loads_nothing(run):
    html = page(run)
    assert "http" not in html and "url(" not in html and "@import" not in html
    reader = read(run)
    assert not {tag for tag, _, _ in reader.attributes} & {"script", "link", "img", "iframe"}
    assert not {key for _, key, _ in reader.attributes} & {"src", "href", "xlink:href", "srcset"}
    assert not [key for _, key, _ in reader.attributes if key.startswith("on")]


def test_page_names_every_device_and_medium(run):
    text = text_of(run)
    assert all(device.name in text for device in run.cluster.devices)
    assert all(medium.name in text for medium in run.cluster.media)
    assert "phone" in text and "left out" in text
    assert "shared by 3 devices" in text and "Ports of their own" in text


def test_page_says_first_whether_the_bounds_were_kept(run):
    text = text_of(run)
    assert text.index("QoE kept") < text.index("Cluster")
    strict = run.model_copy(update={"qoe": QoE(step_s=min(run.times_s) / 2)})
    assert "QoE broken" in text_of(strict) and "QoE kept" not in text_of(strict)
    assert "No bound was asked for" in text_of(run.model_copy(update={"qoe": QoE()}))


def test_page_draws_both_timelines_with_every_span(run):
    html = page(run)
    drawn = html.count(" (compute)</title>")
    spans = [*run.predicted.spans, *run.measured.spans]
    assert drawn == sum(span.lane == "compute" for span in spans)
    assert html.index("Predicted: ") < html.index("Measured: ", html.index("Predicted: "))


def test_plan_shows_its_codecs():
    names, groups = ["tablet", "laptop", "desktop"], [["tablet", "laptop"], ["desktop"]]
    plan = plan_of(names, groups)
    codecs = {
        "codecs": [{"forward": "int4", "backward": "int8"}],
        "gradient_codecs": ["fp8", "none"],
        "max_accuracy_loss": 0.03,
    }
    coded = Plan.model_validate({**plan.model_dump(), **codecs})
    plain, shown = (text_of(run_of(names, groups, plan=p)) for p in (plan, coded))
    for text in ("int4 / int8", "gradients summed as fp8", "at most 0.03 of accuracy"):
        assert text in shown
        assert text not in plain


def test_names_are_escaped():
    names = ["<script>alert(1)</script>", 'a"b', "c&d", "e'f>", "</title></svg>"]
    hostile = run_of(
        names, [[names[1]], [names[2], names[3]]], name="<b>&", note='<img src="http://x">'
    )
    reader = read(hostile)
    tags = {tag for tag, _, _ in reader.attributes}
    assert not tags & {"script", "img"}
    text = " ".join(reader.texts)
    assert all(name in text for name in names) and hostile.note in text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"predicted": None}, "No prediction was saved"),
        ({"front": ()}, "other plans were not saved"),
        ({"times_s": ()}, "Fewer than two steps were timed"),
        ({"activity": None}, "traffic was not counted"),
        ({"activity": None}, "Not measured: no meter ran"),
        ({"activity": None, "predicted": None}, "No energy is known"),
        ({"activity": None, "predicted": None}, "Traffic was not counted, and without"),
        ({"qoe": QoE()}, "The run was given no bound"),
        ({"measured": Timeline(source="measured", num_ranks=5)}, "the timeline holds nothing"),
        ({"qoe": QoE(deadline_s=9.0)}, "does not say how many steps"),
        ({"qoe": QoE(energy_j=9.0), "activity": None}, "no energy was measured"),
    ],
)
def test_what_is_missing_is_said(run, fields, sentence):
    assert sentence in text_of(run.model_copy(update=fields))


def test_one_plan_on_the_front_is_explained(run):
    assert "Only one plan was kept" in text_of(run.model_copy(update={"front": (run.plan,)}))
    text = text_of(run.model_copy(update={"front": run.front[1:]}))
    assert "not among them" in text
    assert text_of(run).count("(ran)") == 1


def test_a_cluster_of_one_device_without_network_has_a_page():
    alone = Device(
        name="box", flops_per_s=1e12, mem_bandwidth_bytes_per_s=1e10, memory_bytes=1_000_000
    )
    span = Span(rank=0, lane="compute", label="0F0", start_s=0.0, end_s=1.0)
    bare = Run(
        cluster=Cluster(devices=(alone,)),
        workload=Workload(kind="infer"),
        plan=plan_of(["box"], [["box"]]),
        measured=Timeline(source="measured", num_ranks=1, spans=(span,)),
    )
    text = text_of(bare)
    assert "nothing links these devices" in text and "no network" in text
    assert "one request" in text


def test_generation_is_judged_by_what_was_timed(run):
    cost = Cost(makespan_s=4.0, ttft_s=0.5, tpot_s=0.1)
    chat = run.model_copy(
        update={
            "workload": Workload(kind="generate", prompt_tokens=64, new_tokens=32),
            "plan": run.plan.model_copy(update={"cost": cost}),
            "qoe": QoE(ttft_s=1.0, latency_s=5.0),
        }
    )
    latency, first = bounds(chat)
    assert (latency.field, latency.predicted) == ("latency_s", 4.0)
    assert latency.is_kept and first.is_kept is None
    text = text_of(chat)
    assert "tokens were not timed one by one" in text and "the prompt" in text
    assert not predicted_energy(chat)


def test_energy_splits_as_the_power_model_says(run):
    for one in predicted_energy(run):
        assert sum(one.parts) == pytest.approx(one.total)
    usage = {u.device: u for u in run.activity.usage}
    for one in measured_energy(run):
        is_used = run.plan.placement(HOME.index(one.device)) is not None
        u = usage[one.device]
        expected = device_j(
            run.cluster.device(one.device),
            busy_s=u.busy_s if is_used else 0.0,
            total_s=u.total_s if is_used else 0.0,
            sent_bytes=u.sent_bytes,
            received_bytes=u.received_bytes,
        )
        assert one.total == pytest.approx(expected / len(run.times_s))
        assert one.provenance == "modelled from measured activity"


def test_metered_joules_are_shown_as_measured_and_not_split(run):
    metered = tuple(Energy(device=n, joules=3.0, provenance="measured") for n in HOME)
    timeline = run.measured.model_copy(update={"energy": metered})
    found = measured_energy(run.model_copy(update={"measured": timeline}))
    assert total_j(found) == 15 and all(one.parts is None for one in found)
    assert "not split" in text_of(run.model_copy(update={"measured": timeline}))


def test_traffic_counts_bytes_against_the_rate(run):
    found = {use.medium: use for use in uses(run)}
    assert set(found) == {medium.name for medium in run.cluster.media}
    wifi = found["wifi"]
    assert wifi.source == "measured" and wifi.mean == pytest.approx(0.5, rel=1e-3)
    covered = sum((b - a) * share for a, b, share in wifi.points) / wifi.points[-1][1]
    assert covered == pytest.approx(wifi.mean)


def test_traffic_that_nobody_counted_is_predicted(run):
    found = uses(run.model_copy(update={"activity": None}))
    assert {use.source for use in found} == {"predicted"}
    for use in found:
        shares = [share for _, _, share in use.points]
        assert all(0 <= share <= 1 + 1e-9 for share in shares)
        assert sum(shares) / len(shares) == pytest.approx(use.mean)
    assert next(use for use in found if use.medium == "wifi").mean > 0


def test_exposed_communication_counts_sending_ends_alone():
    def timeline(*labels: str) -> Timeline:
        compute = [
            Span(rank=r, lane="compute", label=f"{r}F0", start_s=r, end_s=r + 1) for r in (0, 1)
        ]
        sent = [Span(rank=0, lane="network", label=labels[0], start_s=1, end_s=3)]
        received = [
            Span(rank=1, lane="network", label=label, start_s=1, end_s=3) for label in labels[1:]
        ]
        return Timeline(source="measured", num_ranks=3, spans=(*compute, *sent, *received))

    assert exposed_s(timeline("0SEND_F0")) == exposed_s(timeline("F0 to 1", "F0 from 0")) == 1.0
    silent = timeline("F0 to 1")
    assert exposed_s(silent.model_copy(update={"spans": silent.spans[:2]})) is None


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.floats(1, 99))
def test_bound_is_kept_if_the_judged_share_keeps_it(times, level):
    value = percentile(tuple(times), level)
    if level != 50:
        assert sum(t <= value for t in times) >= level / 100 * len(times) - 1e-6
        assert sum(t < value for t in times) < level / 100 * len(times)
    assert min(times) <= value <= max(times)


LABELS = st.sampled_from(
    ["0F0", "1B3", "0SEND_F1", "1SEND_B2", "1REDUCE_GRAD", "input 2", "F1 to 2", "B0 from 1",
     "loss to 0", "reduce to 3", "RECV_F 1F0", "0OPT", "the result"]
)  # fmt: skip
SPANS = st.builds(
    lambda rank, lane, label, start, length: Span(
        rank=rank, lane=lane, label=label, start_s=start, end_s=start + length
    ),
    st.integers(0, 4),
    st.sampled_from(["compute", "network", "wait"]),
    LABELS | st.text(max_size=12),
    st.floats(-1e3, 1e5),
    st.floats(0, 10),
)


@settings(max_examples=25)
@given(st.lists(SPANS, max_size=12))
def test_any_timeline_makes_a_page(run, spans):
    timeline = Timeline(source="measured", num_ranks=5, spans=tuple(spans))
    html = page(run.model_copy(update={"measured": timeline, "times_s": (), "activity": None}))
    assert "nan" not in re.findall(r'="([^"]*)"', html)
    assert html.rstrip().endswith("</html>")


@given(st.floats(1e-5, 1e13))
def test_numbers_keep_three_digits(value):
    assert float(digits(value)) == pytest.approx(value, rel=5.1e-3)
    number, unit = with_unit(value, "B").split(" ")
    factor = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1, "mB": 1e-3, "µB": 1e-6}[unit]
    assert float(number) * factor == pytest.approx(value, rel=6e-3)
    assert "e" not in number


def test_numbers_read_well():
    assert [seconds(v) for v in (0.0, 8.3e-4, 0.0124, 0.9999, 1.7321, 754)] == [
        "0 s", "830 µs", "12.4 ms", "1 s", "1.73 s", "12.6 min",
    ]  # fmt: skip
    assert [ordinal(v) for v in (50, 90, 91, 92, 93, 12, 99.9)] == [
        "median", "90th percentile", "91st percentile", "92nd percentile", "93rd percentile",
        "12th percentile", "99.9th percentile",
    ]  # fmt: skip
    assert ticks(1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(30, 0.9) == [1, 2, 5, 10, 20]


@given(st.floats(1e-6, 1e6), st.floats(0, 0.99), st.integers(2, 9))
def test_ticks_are_few_and_inside(end, share, most):
    found = ticks(end, most, share * end)
    assert len(found) <= most + 1
    assert all(share * end - 1e-6 * end <= tick <= end * (1 + 1e-6) for tick in found)


def test_traces_keep_the_processes_of_both_timelines_apart(run):
    events = json.loads(to_traces([run.predicted, run.measured], HOME))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len(names) == 2 * len(HOME) == len(set(names.values()))
    assert names[1] == "predicted rank 0 phone" and names[6] == "measured rank 0 phone"
    begins = [min(e["ts"] for e in events if e["ph"] == "X" and (e["pid"] > 5) == late)
              for late in (False, True)]  # fmt: skip
    assert begins == [0, 0]


# -------------------------------------------------------------------------- the command


def test_command_writes_page_and_trace(run, tmp_path, capsys):
    save(run, tmp_path / "run.json")
    report_command(tmp_path)
    assert (tmp_path / "report.html").read_text() == page(run)
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {
        "source": "predicted and measured"
    }
    assert capsys.readouterr().err.count("Written:") == 2


def test_command_reads_its_options(run, tmp_path):
    app = typer.Typer()
    app.command()(report_command)
    save(run, tmp_path / "run.json")
    arguments = [str(tmp_path), "--out", str(tmp_path / "page.html")]
    assert not app(arguments, standalone_mode=False)
    with pytest.raises(SpecError, match=r"page.html: exists"):
        app(arguments, standalone_mode=False)
    assert not app([*arguments, "--force"], standalone_mode=False)
    with pytest.raises(SpecError, match=r"gone.*can not be read"):
        app([str(tmp_path / "gone")], standalone_mode=False)


def test_command_takes_the_file_itself_and_another_place(run, tmp_path):
    save(run, tmp_path / "run.json")
    page_file = tmp_path / "out" / "page.html"
    assert write_report(tmp_path / "run.json", page_file) == (page_file, tmp_path / "trace.json")


def test_command_overwrites_only_when_told(run, tmp_path):
    save(run, tmp_path / "run.json")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(SpecError, match=r"report.html: exists, allowed: a new file, or --force"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
    assert not (tmp_path / "trace.json").exists()
    write_report(tmp_path, force=True)
    assert (tmp_path / "report.html").read_text() != "mine"
    (tmp_path / "trace.json").write_text("mine")
    assert write_report(tmp_path, tmp_path / "other.html")[1] is None
    assert (tmp_path / "trace.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["without run.json"]),
        ("{", ["run.json"]),
        ('{"schema": "Plan/1"}', ["Plan/1", "Run/1"]),
        ("phone", ["activity.usage", "'tv'", "laptop"]),
        ("rank", ["measured", "rank 7", "below 5"]),
    ],
)
def test_command_says_in_one_line_what_is_wrong(run, tmp_path, content, words):
    if content == "phone":
        wrong = Activity(usage=(Usage(device="tv", total_s=1.0, busy_s=0.0),))
        save(run.model_copy(update={"activity": wrong}), tmp_path / "run.json")
    elif content == "rank":
        wrong = run.measured.model_copy(update={"num_ranks": 8})
        save(run.model_copy(update={"measured": wrong}), tmp_path / "run.json")
    elif content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(SpecError) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "report.html").exists()


# ----------------------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, to look at the page")
# Shows the page in a frame of some width and writes into the title what sticks out of it; what is
# in a box that scrolls may be wide.
FRAME = """<!doctype html><title></title><iframe width="{width}" height="800" srcdoc="{page}"
 style="border:0" onload="
  const inside = this.contentDocument, wide = [...inside.querySelectorAll('main *')].filter(
    e => !e.closest('.scroll') && e.getBoundingClientRect().right > {width} + 0.5);
  document.title = inside.documentElement.scrollWidth + ':' +
    wide.map(e => e.getAttribute('class') || e.tagName)"></iframe>"""


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    profile = f"--user-data-dir={file.parent / 'profile'}"
    return subprocess.run(
        [BROWSER, *flags, profile, *options, file.as_uri()],
        capture_output=True, text=True, timeout=90, check=False, cwd=file.parent,
    )  # fmt: skip


@in_browser
def test_page_is_drawn_by_a_browser(run, tmp_path):
    save(run, tmp_path / "run.json")
    file, _ = write_report(tmp_path)
    done = browse(file, "--screenshot=page.png", "--window-size=1280,900", "--hide-scrollbars")
    assert "CONSOLE" not in done.stderr, done.stderr
    rows = pixels(tmp_path / "page.png")
    assert len(rows) == 900
    assert len(set(rows)) > 100


@in_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_never_wider_than_the_window(tmp_path, width):
    names = [f"a-board-with-a-rather-long-name-in-the-corridor-number-{i}" for i in range(5)]
    long = run_of(names, [[names[1]], names[2:4], [names[4]]], name="x" * 90)
    file = tmp_path / "frame.html"
    file.write_text(FRAME.format(width=width, page=escape(page(long))))
    done = browse(file, "--dump-dom", "--window-size=1400,900", "--hide-scrollbars")
    assert re.search(r"<title>(.*?)</title>", done.stdout)[1] == f"{width}:", done.stderr


def pixels(file: Path) -> list[bytes]:
    """Returns the packed rows of a PNG: the filter of a row and its bytes."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    place, packed, size = 8, b"", (0, 0)
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        packed += body if kind == b"IDAT" else b""
        place += length + 12
    raw = zlib.decompress(packed)
    stride = len(raw) // size[1]
    return [raw[i * stride : (i + 1) * stride] for i in range(size[1])]
