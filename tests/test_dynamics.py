"""Traces: files and what they must not contain, names, and the statistics of generated ones."""

from __future__ import annotations

from math import log, sqrt
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora.errors import SpecError
from dora.simulator import Dynamics, load_dynamics, wandering
from dora.spec import Cluster, Device, Link, Medium


def make_cluster() -> Cluster:
    devices = tuple(
        Device(name=name, flops_per_s=1e9, mem_bandwidth_bytes_per_s=1e9, memory_bytes=10**9)
        for name in ("phone", "laptop")
    )
    return Cluster(
        devices=devices,
        media=(
            Medium(name="cable", rate_bytes_per_s=1e6),
            Medium(name="wifi", rate_bytes_per_s=1e6),
        ),
        links=(Link(src="phone", dst="laptop", media=("wifi",)),),
    )


def write(path: Path, text: str) -> Path:
    file = path / "trace.csv"
    file.write_text(text)
    return file


def test_load_sorts_by_time(tmp_path):
    file = write(tmp_path, "at_s,name,factor\n12.5,wifi,0.4\n0,wifi,1.0\n12.5,phone,0\n")
    found = load_dynamics(file, make_cluster())
    assert found.entries == ((0.0, "wifi", 1.0), (12.5, "wifi", 0.4), (12.5, "phone", 0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,name,factor\n", r"given columns .*'time'.*allowed .*'at_s'"),
        ("", "given columns None"),
        ("at_s,name,factor\n0,router,1\n", r"line 2: given 'router', allowed: \['cable', 'laptop'"),
        ("at_s,name,factor\n0,wifi,1\n1,wifi,-0.5\n", "line 3: given '-0.5'"),
        ("at_s,name,factor\nsoon,wifi,1\n", "line 2: given 'soon'"),
        ("at_s,name,factor\n0,wifi,nan\n", "line 2: given 'nan'"),
        ("at_s,name,factor\n0,wifi\n", "line 2: given None"),
    ],
)
def test_load_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(SpecError, match=message) as error:
        load_dynamics(write(tmp_path, text), make_cluster())
    assert "\n" not in str(error.value)


def test_changes_are_by_index_of_medium_and_rank():
    trace = Dynamics(((0.0, "wifi", 0.5), (1.0, "phone", 0.25), (2.0, "elsewhere", 0.0)))
    found = trace.changes(("laptop", "phone"), make_cluster())
    assert found == [(0.0, True, 1, 0.5), (1.0, False, 1, 0.25)]
    assert trace.changes(("laptop",), make_cluster()) == [(0.0, True, 1, 0.5)]


@settings(max_examples=20)
@given(st.floats(0.1, 1), st.floats(0, 0.9), st.integers(0, 5))
def test_wandering_has_the_statistics_that_were_asked_for(cv, correlation, seed):
    trace = wandering("wifi", duration_s=4000, cv=cv, correlation=correlation, seed=seed)
    logs = [log(factor) for _, _, factor in trace.entries]
    sigma = sqrt(log(1 + cv * cv))
    # Samples that resemble each other count as fewer; six standard errors.
    error = 6 * sqrt((1 + correlation) / (1 - correlation) / len(logs))
    assert abs(fmean(logs)) <= error * sigma
    assert pstdev(logs) == pytest.approx(sigma, rel=error)
    products = fmean(a * b for a, b in zip(logs, logs[1:], strict=False)) / sigma**2
    assert products == pytest.approx(correlation, abs=2 * error)


def test_wandering_is_repeatable_and_ascends():
    one, same, other = (
        wandering("wifi", duration_s=10, cv=0.4, correlation=0.5, step_s=0.5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert [at_s for at_s, _, _ in one.entries] == [0.5 * i for i in range(21)]
    assert all(factor > 0 for _, _, factor in one.entries)
