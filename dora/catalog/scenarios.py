"""Whole situations to plan for: a cluster, and which models people run on it how fast.

::

    home = scenario("smart-home-1")
    for cell in home.cells:
        profile = cell_profile(cell, home.cluster)

Each is a pair of files in scenarios/: NAME.toml is a cluster file like any other, and
NAME.qoe.toml lists the cells, in tables `[[cell]]` with model, workload and qoe. The bounds follow
from what users notice, as each file says at its top, and not from what some planner reaches. A
comment marks the cells that are not expected to be met.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from dora import files
from dora.catalog import tables
from dora.catalog.cluster import load_cluster
from dora.catalog.models import model_profile
from dora.catalog.roofline import scale_to_cluster
from dora.errors import SpecError
from dora.spec import Cluster, ModelProfile, QoE, Spec, Workload
from dora.spec.base import Name

_FILES = Path(__file__).with_name("scenarios")
_CELLS = ".qoe.toml"

# Tokens of a pass: one for each that is generated, and a prompt whole or in pieces.
_TOKENS = (1, 8, 32, 128, 512)


class Cell(NamedTuple):
    """One model, what it is run for, and how well."""

    model: str
    workload: Workload
    qoe: QoE


class Scenario(NamedTuple):
    """A cluster and the cells to plan for on it."""

    name: str
    cluster: Cluster
    description: str
    cells: tuple[Cell, ...]


class _CellTable(Spec):
    """A `[[cell]]` table."""

    model: Name
    workload: Workload
    qoe: QoE


class _CellFile(Spec):
    """The tables of a file of cells."""

    description: Name
    cell: Annotated[tuple[_CellTable, ...], Field(min_length=1)]


def scenario_names() -> tuple[str, ...]:
    """Returns the names that `scenario` knows, in alphabetical order."""
    return tuple(sorted(path.name.removesuffix(_CELLS) for path in _FILES.glob(f"*{_CELLS}")))


def scenario(name: str) -> Scenario:
    """Returns the scenario of that name.

    Raises:
        SpecError: Unknown name; the message lists the known ones.
    """
    if name not in scenario_names():
        raise SpecError(f"scenario: given {name!r}, {tables.closest(name, scenario_names())}")
    source = _FILES / f"{name}{_CELLS}"
    content = files.validate(_CellFile, files.read_toml(source), source=str(source))
    return Scenario(
        name=name,
        cluster=load_cluster(_FILES / f"{name}.toml"),
        description=content.description,
        cells=tuple(Cell(c.model, c.workload, c.qoe) for c in content.cell),
    )


def cell_profile(cell: Cell, cluster: Cluster) -> ModelProfile:
    """Returns the cell's model with predicted times on all devices of the cluster.

    Rows are the powers of two up to the batch size, and that size itself; to generate, passes
    over 1 to 512 tokens and over the whole prompt.
    """
    work = cell.workload
    if work.kind == "generate":
        sizes = sorted({*_TOKENS, max(work.prompt_tokens, 1)})
    else:
        powers = (2**i for i in range(work.batch_size.bit_length()))
        sizes = sorted({*powers, work.batch_size})
    profile = model_profile(cell.model, kind=work.kind, microbatch_sizes=sizes)
    return scale_to_cluster(profile, cluster, training=work.kind == "train")
