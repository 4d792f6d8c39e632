"""The testbed: how it lays out clusters, what programs on it see, that nothing is left of it."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora import catalog, cli
from dora.errors import SpecError
from dora.simulator.dynamics import Dynamics
from dora.spec import Cluster, Device, Link, Medium
from dora.testbed import (
    Event,
    Job,
    Scale,
    Testbed,
    cgroup,
    names,
    netns,
    parse_event,
    remove_left_over,
    why_not,
)
from dora.testbed.scale import emulated, largest, packed, shares, speed
from dora.testbed.wiring import Wiring, wire

needs_root = pytest.mark.skipif(bool(why_not()), reason=f"the testbed {why_not()}")
WAIT_S = 30.0

# ------------------------------------------------------------ wiring


def device_of(name: str, flops_per_s: float = 1e9, memory_bytes: int = 1 << 30) -> Device:
    return Device(
        name=name,
        flops_per_s=flops_per_s,
        efficiency=1.0,
        mem_bandwidth_bytes_per_s=1e9,
        memory_bytes=memory_bytes,
    )


def cluster_of(paths: dict[tuple[int, int], tuple[str, ...]], num_devices: int) -> Cluster:
    media = dict.fromkeys(name for path in paths.values() for name in path)
    return Cluster(
        devices=tuple(device_of(f"d{i}") for i in range(num_devices)),
        media=tuple(Medium(name=name, rate_bytes_per_s=1e6) for name in media),
        links=tuple(Link(src=f"d{a}", dst=f"d{b}", media=path) for (a, b), path in paths.items()),
    )


def crossed(wiring: Wiring, src: int, dst: int) -> list[int]:
    """Returns the media that a packet passes, one place of the layout after the other."""
    sites = wiring.site_of[src], wiring.site_of[dst]
    found = [wiring.entering[src, dst]]
    if sites[0] != sites[1]:
        found += wiring.trunks[sites]
    return [*found, *([wiring.leaving[src, dst]] if (src, dst) in wiring.leaving else [])]


def check_wiring(cluster: Cluster) -> None:
    wiring = wire(cluster)
    device = {d.name: i for i, d in enumerate(cluster.devices)}
    media = [medium.name for medium in cluster.media]
    for link in cluster.links:
        passed = crossed(wiring, device[link.src], device[link.dst])
        assert [media[i] for i in passed] == list(link.media), link


@pytest.mark.parametrize("name", catalog.scenario_names())
def test_packets_cross_the_media_of_their_link(name):
    check_wiring(catalog.scenario(name).cluster)


@st.composite
def places(draw: st.DrawFn) -> Cluster:
    """Returns Wi-Fi channels and wired ports in a few places, some of them behind an uplink."""
    has_uplink = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    homes = draw(
        st.lists(
            st.tuples(st.integers(0, len(has_uplink) - 1), st.booleans()), min_size=2, max_size=7
        )
    )

    def access(i: int, way: str) -> str:
        place, is_wired = homes[i]
        return f"d{i}.{way}" if is_wired else f"p{place}.wifi"

    def path(a: int, b: int) -> tuple[str, ...]:
        (here, _), (there, _) = homes[a], homes[b]
        up = (f"p{here}.up",) * (has_uplink[here] and here != there)
        down = (f"p{there}.down",) * (has_uplink[there] and here != there)
        return (access(a, "up"), *up, *down, access(b, "down"))

    ends = [(a, b) for a in range(len(homes)) for b in range(len(homes)) if a != b]
    kept = [pair for pair in ends if draw(st.integers(0, 9))]  # some pairs have no link
    return cluster_of({pair: path(*pair) for pair in kept}, len(homes))


@given(places())
def test_packets_cross_the_media_of_their_link_in_any_layout(cluster):
    check_wiring(cluster)


@given(st.integers(2, 6))
def test_one_channel_is_one_site(num_devices):
    ends = [(a, b) for a in range(num_devices) for b in range(num_devices) if a != b]
    for path in (("wifi",), ("wifi", "wifi")):
        cluster = cluster_of(dict.fromkeys(ends, path), num_devices)
        check_wiring(cluster)
        assert wire(cluster).num_sites == 1


@pytest.mark.parametrize(
    "paths",
    [
        {(0, 1): ("a", "b", "c", "d", "e")},
        {(0, 1): ("a", "b"), (1, 2): ("b", "c"), (0, 2): ("a", "x", "c")},
        {(0, 1): ("a", "b"), (0, 2): ("a", "up", "c"), (1, 2): ("b", "other", "c")},
    ],
    ids=["five media", "a detour within a site", "two ways between sites"],
)
def test_what_can_not_be_laid_out_is_refused_in_one_line(paths):
    with pytest.raises(SpecError, match="which the testbed can not lay out, allowed") as error:
        wire(cluster_of(paths, 3))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------ scale


def computers(speeds: list[float]) -> Cluster:
    return Cluster(devices=tuple(device_of(f"d{i}", flops) for i, flops in enumerate(speeds)))


SPEEDS = st.lists(st.floats(1e9, 1e11), min_size=1, max_size=6)
CORES, CORE_FLOPS_PER_S = st.integers(1, 16), st.floats(1e9, 1e12)


@given(SPEEDS, CORES, CORE_FLOPS_PER_S)
def test_largest_scale_fits_and_keeps_proportions(speeds, num_cores, core):
    cluster = computers(speeds)
    scale = largest(cluster, num_cores, core)
    try:
        found = shares(cluster, scale, num_cores, core)
    except SpecError as error:
        assert "allowed: at least" in str(error)
        return
    assert max(found) <= 1 + 1e-9 and sum(found) < num_cores
    for device, share in zip(cluster.devices, found, strict=True):
        assert share * core == pytest.approx(speed(device) * scale)


@given(SPEEDS, CORES)
def test_too_large_a_scale_names_one_that_fits(speeds, num_cores):
    cluster = computers(speeds)
    wanted = 1.5 * num_cores * 1e10 / sum(speeds)
    with pytest.raises(SpecError, match="allowed: at most") as error:
        shares(cluster, wanted, num_cores, 1e10)
    assert "\n" not in str(error.value)
    allowed = 0.999 * float(str(error.value).rpartition(" ")[2])  # it is rounded
    assert allowed == pytest.approx(wanted / 1.5, rel=0.01)
    if min(speeds) * allowed > 0.011 * 1e10:
        assert sum(shares(cluster, allowed, num_cores, 1e10)) <= num_cores


def test_a_device_that_gets_next_to_nothing_is_named():
    with pytest.raises(SpecError, match=r"leaves 0\.0010 cores for d1") as error:
        shares(computers([1e12, 1e9]), 1.0, 2, 1e12)
    assert "\n" not in str(error.value)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8))
def test_devices_are_packed_onto_processors(cores):
    cpus, places = os.sched_getaffinity(0), packed(cores)
    assert len(places) == len(cores)
    assert all(place and set(place) <= cpus for place in places)
    if all(len(place) == 1 for place in places):
        for cpu in cpus:
            load = sum(c for c, place in zip(cores, places, strict=True) if place == [cpu])
            assert len(cpus) == 1 or load <= 1


@pytest.mark.parametrize("has_delay", [True, False])
def test_emulated_cluster_is_slower_by_the_factors(has_delay):
    given_cluster = catalog.scenario("smart-home-2").cluster
    cluster = emulated(given_cluster, Scale(0.1, 0.5), has_delay=has_delay)
    assert cluster.links == given_cluster.links
    for slow, fast in zip(cluster.devices, given_cluster.devices, strict=True):
        assert speed(slow) == pytest.approx(0.1 * speed(fast))
        assert slow.memory_bytes == fast.memory_bytes
    for slow, fast in zip(cluster.media, given_cluster.media, strict=True):
        assert slow.rate_bytes_per_s == pytest.approx(0.5 * fast.rate_bytes_per_s)
        assert slow.latency_s == pytest.approx(fast.latency_s / 0.5 if has_delay else 0.0)


# ------------------------------------------------------------ control groups

V1 = """\
proc /proc proc rw,relatime 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,nodev,noexec,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,nosuid,nodev,noexec,relatime,memory 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,nosuid,nodev,noexec,relatime,cpuset 0 0
"""


def test_controllers_of_version_1_are_found():
    joint = Path("/sys/fs/cgroup/cpu,cpuacct")
    found = cgroup.mounts(V1)
    assert found == {"cpu": joint, "cpuacct": joint, "memory": Path("/sys/fs/cgroup/memory")}
    assert not cgroup.why_not(found)
    assert cgroup.why_not({"cpu": joint, "cpuacct": joint})


def test_controllers_of_version_2_are_found(tmp_path):
    text = f"cgroup2 {tmp_path} cgroup2 rw,nosuid,nodev,noexec,relatime,nsdelegate 0 0\n"
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
    assert cgroup.mounts(text) == {"unified": tmp_path}
    assert not cgroup.why_not({"unified": tmp_path})
    (tmp_path / "cgroup.controllers").write_text("pids\n")  # the others were not delegated
    assert cgroup.why_not(cgroup.mounts(text))


def test_version_1_beside_an_empty_version_2_is_used(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("\n")
    text = f"{V1}cgroup2 {tmp_path} cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n"
    assert cgroup.mounts(text) == cgroup.mounts(V1)


def group_v2(folder: Path) -> tuple[cgroup.DeviceGroup, Path]:
    return cgroup.DeviceGroup("testbed", "d0", {"unified": folder}), folder / "testbed" / "d0"


def test_limits_of_version_2(tmp_path):
    group, folder = group_v2(tmp_path)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (folder.parent / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert group.entries == [folder / "cgroup.procs"]
    group.limit_memory(1 << 20)
    assert (folder / "memory.max").read_text() == str(1 << 20)
    group.limit_cores(None)
    assert (folder / "cpu.max").read_text().split()[0] == "max"


@given(st.floats(0.01, 4.0))
def test_quota_is_the_share_of_the_period(tmp_path_factory, cores):
    group, folder = group_v2(tmp_path_factory.mktemp("cgroup"))
    group.limit_cores(cores)
    quota, period = map(int, (folder / "cpu.max").read_text().split())
    assert quota / period == pytest.approx(cores, rel=0.01)
    assert quota >= 1000 and period <= 1_000_000  # the kernel's bounds


def test_counters_of_version_2(tmp_path):
    group, folder = group_v2(tmp_path)
    (folder / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\nnr_periods 4\n")
    (folder / "memory.peak").write_text("4096\n")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 0\n")
    (folder / "cgroup.procs").write_text("12\n34\n")
    assert (group.cpu_s(), group.peak_bytes(), group.pids()) == (2.5, 4096, [12, 34])
    assert not group.out_of_memory()
    (folder / "memory.events").write_text("max 7\noom 1\noom_kill 2\n")
    assert group.out_of_memory()


# ------------------------------------------------------------ names and events


def test_names_tell_whose_process_has_ended():
    assert names.fresh() != names.fresh()
    assert not names.is_left_over(names.fresh())
    program = "from dora.testbed.names import fresh; print(fresh())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(names.PREFIX)
    assert names.is_left_over(done.stdout.strip())


THREE = computers([1e9] * 3)


@given(
    st.floats(0, 1e6),
    st.sampled_from(["kill", "restart", "pause", "resume", "disconnect", "connect"]),
    st.sampled_from(["d0", "d1", "d2"]),
)
def test_events_are_read_back(at_s, verb, name):
    assert parse_event(f"{at_s} {verb} {name}", THREE) == Event(at_s, verb, name)


@pytest.mark.parametrize(
    "text", ["", "3 kill", "3 kill d9", "3 eat d0", "-1 kill d0", "nan kill d0", "soon kill d0"]
)
def test_events_that_make_no_sense_are_refused_in_one_line(text):
    with pytest.raises(SpecError, match="allowed: 'SECONDS VERB NAME'") as error:
        parse_event(text, THREE)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------ programs on devices

HOME = """
[[network]]
name = "wifi"
network = "wifi6_80_2ss"
"""
DEVICE = """
[[device]]
name = "{}"
device = "rpi5-8gb"
network = "wifi"
memory_bytes = 64_000_000
"""
# Every rank tells all others its rank; nobody leaves before all have heard.
MEET = """
import os, socket, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
host = os.environ["MASTER_ADDR"].rpartition(".")[0]

def dial(peer):
    while True:
        try:
            return socket.create_connection((f"{host}.{peer + 1}", 5000))
        except OSError:
            time.sleep(0.02)

def meet():
    out = [dial(peer) for peer in range(size) if peer != rank]
    for connection in out:
        connection.sendall(bytes([rank]))
    return sorted(server.accept()[0].recv(1)[0] for _ in out)

server = socket.create_server(("", 5000))
heard = meet()
"""
FOREVER = MEET + "print('ready', os.getpid())\nwhile True: time.sleep(0.05); print('on')\n"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    devices = "".join(map(DEVICE.format, ("den", "hall", "attic")))
    (tmp_path / "home.toml").write_text(HOME + devices)
    return tmp_path


def three(rate_bytes_per_s: float = 1e7, memory_bytes: int = 1 << 26) -> Cluster:
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    cluster = cluster_of(dict.fromkeys(pairs, ("wifi", "wifi")), 3)
    media = (Medium(name="wifi", rate_bytes_per_s=rate_bytes_per_s),)
    devices = tuple(device_of(f"d{i}", 1e11, memory_bytes) for i in range(3))
    return cluster.model_copy(update={"devices": devices, "media": media})


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def left_of(pid: int) -> list[str]:
    """Returns the namespaces and control groups of a process's testbeds."""
    prefix = f"{names.PREFIX}-{pid}-"
    spaces = [path.name for path in Path("/run/netns").glob(f"{prefix}*")]
    mounts = set(cgroup.mounts().values())
    return spaces + [str(path) for mount in mounts for path in mount.glob(f"{prefix}*")]


def processes_with(text: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    return [
        p
        for p in found
        if text in " ".join(p.info["cmdline"] or ()) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def fabric() -> str:
    """Returns the namespace in which this process's only testbed joins its devices."""
    (found,) = Path("/run/netns").glob(f"{names.PREFIX}-{os.getpid()}-*-fabric")
    return found.name


@needs_root
def test_program_gets_its_rank_and_reaches_all_others(home, capsys):
    (home / "meet.py").write_text(
        MEET + "print(rank, size, os.environ['MASTER_ADDR'], heard, sys.argv[1:])"
    )
    command = ["testbed", "home.toml", "--out", "counted", "--", "meet.py", "{run}", "--flag"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    for rank, (name, others) in enumerate({"den": [1, 2], "hall": [0, 2], "attic": [0, 1]}.items()):
        arguments = [str(home / "counted"), "--flag"]
        assert f"[{name}] {rank} 3 {netns.address(0)} {others} {arguments}" in printed.out
        assert name in printed.err
    assert (home / "counted" / "activity.json").exists()
    assert not left_of(os.getpid())
    assert cli.main(command) == 2  # nothing is overwritten
    assert "counted/activity.json" in capsys.readouterr().err


@needs_root
def test_failure_names_device_rank_and_exit_code(home, capsys):
    (home / "fail.py").write_text(MEET + "sys.exit(3 if rank == 1 else 0)")
    assert cli.main(["testbed", "home.toml", "--", "fail.py"]) == 1
    assert "dora: hall (rank 1) ended with exit code 3" in capsys.readouterr().err
    assert not left_of(os.getpid())


@needs_root
def test_limit_on_time_ends_the_program(home, capsys):
    (home / "forever.py").write_text(FOREVER)
    assert cli.main(["testbed", "home.toml", "--limit-s", "1", "--", "forever.py"]) == 1
    assert "still running after 1 s" in capsys.readouterr().err
    assert not processes_with(str(home / "forever.py"))


@needs_root
def test_too_much_memory_is_said_to_be_the_reason():
    program = MEET + "x = b'x' * (700 << 20 if rank == 1 else 1); time.sleep(0.2)"
    with Testbed(three()) as testbed:
        job = Job(testbed, python(program), os.environ, limit_s=WAIT_S)
        assert not list(job.lines())
    assert re.search(r"^d1 \(rank 1\) was killed: it needed more than its memory", job.problem)


RESTARTED = (
    MEET.replace("heard = meet()", "")
    + """
import pathlib
first, again = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
if rank == 1 and first.exists():
    again.touch(); print("again"); sys.exit()
if rank == 1:
    first.touch(); dial(0); time.sleep(60)
while not first.exists(): time.sleep(0.02)  # a refusal of d1 would count as sent by it
while not again.exists():
    try: socket.create_connection((f"{host}.2", 5000)).close()
    except OSError: pass
    time.sleep(0.02)
"""
)


@needs_root
def test_killed_device_starts_again(tmp_path):
    events = [Event(0.1, "kill", "d1"), Event(0.3, "restart", "d1")]
    command = [*python(RESTARTED), str(tmp_path / "first"), str(tmp_path / "again")]
    with Testbed(three()) as testbed:
        job = Job(testbed, command, os.environ, events=events, limit_s=WAIT_S)
        assert list(job.lines()) == [("d1", "again")]
    assert not job.problem


@needs_root
def test_paused_device_goes_on_when_resumed():
    events = [Event(0.1, "pause", "d1"), Event(0.5, "resume", "d1")]
    with Testbed(three()) as testbed:
        job = Job(testbed, python(FOREVER), os.environ, events=events, limit_s=WAIT_S)
        process, was_stopped = None, False
        for name, line in job.lines():
            if name == "d1" and line.startswith("ready"):
                process = psutil.Process(int(line.split()[1]))
            is_stopped = bool(process) and process.status() == psutil.STATUS_STOPPED
            if was_stopped and name == "d1" and not is_stopped:
                job.stop()
                break
            was_stopped |= is_stopped
    assert was_stopped and not is_stopped


PING = (
    MEET
    + """
if rank == 1:
    connection = server.accept()[0]
    while data := connection.recv(1): connection.sendall(data)
if rank == 0: connection = dial(1)
while rank == 0:
    connection.sendall(b"x"); connection.recv(1); print("pong"); time.sleep(0.02)
time.sleep(60)
"""
)


@needs_root
@pytest.mark.parametrize("what", ["cable", "medium"])
def test_nothing_passes_what_is_disconnected(what):
    with Testbed(three()) as testbed:

        def connect(is_connected: bool) -> None:
            if what == "cable":
                testbed.set_connected("d1", is_connected)
            else:
                testbed.set_rate("wifi", float(is_connected))

        job = Job(testbed, python(PING), os.environ, limit_s=WAIT_S)
        pongs = (line for _, line in job.lines())
        assert next(pongs) == next(pongs) == "pong"
        connect(False)
        time.sleep(0.2)  # for what was on its way
        before = testbed.activity()
        time.sleep(0.4)
        after = testbed.activity()
        received = [a.usage[1].received_bytes for a in (before, after)]
        assert received[1] - received[0] < 600  # IPv6 of the kernels themselves goes on
        connect(True)
        for _ in range(50):  # more than were on their way
            assert next(pongs) == "pong"
        assert not job.problem


def _rate_of(medium: int) -> float:
    """Returns Mbit/s of a medium's bucket, as the kernel tells."""
    printed = netns.run("tc", "-n", fabric(), "qdisc", "show", "dev", f"medium{medium}")
    value, unit = re.search(r"rate ([\d.]+)([KMG]?)bit", printed).groups()
    return float(value) * {"": 1e-6, "K": 1e-3, "M": 1.0, "G": 1e3}[unit]


@needs_root
def test_trace_changes_rates_and_speeds():
    dynamics = Dynamics(((0.0, "wifi", 0.5), (0.0, "d1", 0.5)))
    with Testbed(three()) as testbed:
        before = _rate_of(0)
        job = Job(testbed, python(FOREVER), os.environ, dynamics=dynamics, limit_s=WAIT_S)
        for _ in job.lines():
            if _rate_of(0) < 0.9 * before:
                job.stop()
                break
        assert _rate_of(0) == pytest.approx(before / 2, rel=0.01)


BULK = """
if rank == 0:
    dial(1).sendall(bytes(1 << 20))
if rank == 1:
    connection = server.accept()[0]
    while connection.recv(1 << 16): pass
"""


@needs_root
def test_usage_counts_what_was_computed_and_sent():
    """A medium that is crossed twice carries twice what is sent."""
    program = MEET + BULK
    with Testbed(three()) as testbed:
        job = Job(testbed, python(program), os.environ, limit_s=WAIT_S)
        assert not list(job.lines()) and not job.problem
        activity = testbed.activity()
    sent, received = activity.usage[0].sent_bytes, activity.usage[1].received_bytes
    assert 1.0 * 2**20 < sent < 1.2 * 2**20 and 1.0 * 2**20 < received < 1.2 * 2**20
    assert 2.0 * 2**20 < activity.traffic[0].carried_bytes[-1] < 2.4 * 2**20
    assert all(usage.busy_s > 0 and usage.peak_bytes > 0 for usage in activity.usage)


@needs_root
def test_two_testbeds_side_by_side():
    program = MEET + "print(heard)"
    with Testbed(three()) as one, Testbed(three()) as two:
        jobs = [Job(testbed, python(program), os.environ, limit_s=WAIT_S) for testbed in (one, two)]
        lines = [sorted(pair) for pair in zip(*(job.lines() for job in jobs), strict=True)]
        assert len(lines) == 3 and not any(job.problem for job in jobs)
        one.close()
        last = Job(two, python(program), os.environ, limit_s=WAIT_S)
        assert len(list(last.lines())) == 3 and not last.problem
    assert not left_of(os.getpid())


# ------------------------------------------------------------ bad input


@needs_root
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trace", "bad.csv", "--", "x.py"], "bad.csv"),
        (["--trace", "none.csv", "--", "x.py"], "none.csv"),
        (["--at", "3 kill cellar", "--", "x.py"], "allowed: 'SECONDS VERB NAME'"),
        (["--network-factor", "0", "--", "x.py"], "--network-factor"),
        (["--scale", "1000", "--", "x.py"], "allowed: at most"),
        (["--scale", "1e-9", "--", "x.py"], "allowed: at least"),
        (["--", "torchrun", "x.py"], "leave out torchrun"),
    ],
)
def test_bad_input_is_one_line(home, capsys, arguments, expected):
    (home / "bad.csv").write_text("at_s,name,factor\n1,cellar,0.5\n")
    assert cli.main(["testbed", "home.toml", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("dora: ") and expected in printed
    assert not left_of(os.getpid())


# ------------------------------------------------------------ nothing is left behind


def start(home: Path) -> subprocess.Popen[str]:
    (home / "forever.py").write_text(FOREVER)
    command = [sys.executable, "-m", "dora.cli", "testbed", "home.toml", "--"]
    return subprocess.Popen(
        [*command, str(home / "forever.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def running(home) -> Iterator[subprocess.Popen[str]]:
    process = start(home)
    assert process.stdout is not None
    while "ready" not in (line := process.stdout.readline()):
        assert line, "ended early"
    yield process
    process.kill()
    process.communicate()


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(running, home, number):
    assert left_of(running.pid)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as a terminal does
    else:
        running.send_signal(number)
    printed, _ = running.communicate(timeout=WAIT_S)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert running.returncode == expected[number], printed
    if number == signal.SIGKILL:
        remove_left_over()  # as the next start does
    assert not left_of(running.pid)
    until(lambda: not processes_with(str(home / "forever.py")))


@needs_root
def test_half_made_namespaces_are_removed():
    done = subprocess.Popen([sys.executable, "-c", ""])
    name = f"{names.PREFIX}-{done.pid}-{names.start_ticks(done.pid)}-0-0"
    done.wait()
    Path(f"/run/netns/{name}").touch()  # what `ip netns add` makes first
    remove_left_over()
    assert not left_of(done.pid)


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_starts_with_kills_at_any_moment_leave_nothing(home):
    dice, pids = random.Random(0), []
    for _ in range(50):
        process = start(home)
        pids.append(process.pid)
        until(lambda pid=process.pid: bool(left_of(pid)))  # it begins to build
        time.sleep(dice.uniform(0.0, dice.choice([0.3, 1.5])))
        number = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        os.killpg(process.pid, number)
        process.communicate(timeout=WAIT_S)
        if number != signal.SIGKILL:
            assert not left_of(process.pid)
    (home / "meet.py").write_text(MEET)
    assert cli.main(["testbed", "home.toml", "--", "meet.py"]) == 0
    assert not [found for pid in [*pids, os.getpid()] for found in left_of(pid)]
    assert not processes_with(str(home))
