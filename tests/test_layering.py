"""The architecture, kept by a test: who imports whom, sizes, and who reads the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dora"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of dora, beside itself, `spec`, `errors` and `files`.
ALLOWED = {
    "spec": set(),
    "errors": set(),
    "files": set(),
    "kernels": set(),
    "adapter": set(),
    "adapt": {"adapter", "catalog", "judge", "planner", "scheduler", "simulator"},
    "console": set(),
    "keys": set(),
    "catalog": set(),
    "partition": set(),
    "profiler": {"kernels"},
    "planner": {"scheduler", "simulator"},
    "scheduler": {"simulator"},
    "simulator": set(),
    "live": set(),
    "runtime": {"kernels", "keys", "live", "partition", "scheduler"},
    "search": {"adapt", "catalog", "judge", "partition", "planner", "profiler", "runtime"},
    "judge": {"planner", "scheduler", "simulator"},
    "compare": {"judge", "planner"},
    "report": set(),
}
BASE = {"spec", "errors", "files"}
NATIVE = {"kernels", "peercheck", "planner", "runtime", "scheduler", "simulator", "testbed"}
JOINS_ALL = {
    "cli", "cli_bench", "cli_join", "cli_network", "cli_plan", "cli_report", "cli_testbed",
    "cli_top", "__init__", "demo", "doctor", "factory", "peercheck", "testbed", "top", "views",
}  # fmt: skip
READS_ENVIRONMENT = {
    "cli.py", "cli_join.py", "cli_network.py", "cli_testbed.py", "keys.py", "buckets.py",
    "environment.py",
}  # fmt: skip
NO_TORCH = {
    "spec", "errors", "files", "catalog", "planner", "scheduler", "simulator", "judge", "compare",
    "report", "adapter", "adapt",
}  # fmt: skip


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Full names of all modules that a file imports; `from a import b` gives a.b and a."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, allowed: from dora.x import y"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def dora_parts(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("dora.")}
    return {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").is_file()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_the_layers(path):
    part = part_of(path)
    if part not in JOINS_ALL:
        base = set() if part in ("spec", "errors") else BASE
        extra = dora_parts(path) - {part} - base - ALLOWED[part]
        assert not extra, f"{part} may not import {sorted(extra)}"
    if part not in NATIVE:
        assert not [n for n in imported(path) if n.startswith("dora._C")], "see CONTRIBUTING"
    if part in NO_TORCH:
        assert not [n for n in imported(path) if n.split(".")[0] == "torch"], "no torch here"
    assert len(path.read_text().splitlines()) <= 400, "split a module of over 400 lines"


def test_spec_imports_nothing_of_dora():
    for path in (PACKAGE / "spec").glob("*.py"):
        assert dora_parts(path) <= {"spec"}


def test_parts_form_no_cycle():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(part_of(path), set()).update(dora_parts(path) - {part_of(path)})
    graph.pop("__init__")
    while graph:
        leaves = [part for part, needs in graph.items() if not needs & set(graph)]
        assert leaves, f"import cycle among {sorted(graph)}"
        for part in leaves:
            del graph[part]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_reads_the_environment_or_prints(path):
    # A secret comes from the environment, so that it stands in no script and no command line.
    # A program in a testbed does not know of it, so that comes from there too.
    # Who asks for the status of a job need not change its program.
    if path.name in READS_ENVIRONMENT:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("os", "environ"), ("os", "getenv")}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "eval", "exec"}


def test_functions_are_short():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path.name}: {node.name} has {lines} lines"


def test_nothing_is_pickled():
    for path in MODULES:
        names = imported(path)
        assert not {"pickle", "cloudpickle"} & set(names), path
        assert "_object(" not in path.read_text(), f"{path}: torch's object collectives pickle"
