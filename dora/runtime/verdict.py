"""How a job goes on after a loss, decided by one rank from what all that are left have told.

Pure: `decide` takes notes and returns a note.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dora.runtime.snapshot import Version

# Given the devices that are gone, the plan to go on with.
Replan = Callable[[tuple[str, ...]], Any]


class Store(NamedTuple):
    """What a rank has of a snapshot: its version, optimizer updates until then, tensors."""

    version: Version
    updates: int
    names: tuple[str, ...]


class Report(NamedTuple):
    """What a rank tells when it joins.

    Attributes:
        position: Collective calls that it has completed.
        kind: Of the call that was interrupted.
        has_result: It had done its part of that call, and waited for the others.
        is_leaving: It goes, once others have what it holds.
        version, updates: Of its state before that call.
        here: Tensors of that version that it can give.
        stores: Its snapshots.
        limit_bytes: Memory of its device.
        has_grads: It has gradients that wait for an optimizer step.
    """

    position: int
    kind: str
    has_result: bool
    is_leaving: bool
    version: Version
    updates: int
    here: tuple[str, ...]
    stores: tuple[Store, ...]
    limit_bytes: int
    has_grads: bool = False

    @classmethod
    def read(cls, fields: Sequence[Any]) -> Report:
        """Returns a report from JSON."""
        report = cls(*fields)
        stores = tuple(Store(Version(*v), u, tuple(names)) for v, u, names in report.stores)
        return report._replace(version=Version(*report.version), stores=stores)

    def is_complete(self, top: int) -> bool:
        """Tells whether the interrupted call counts as done, since some rank has gone on from it.

        Nobody goes on from a call that changes the model before all have its result.
        """
        return self.position < top and self.has_result


class Verdict(NamedTuple):
    """How all go on.

    Attributes:
        participants: Ranks that move tensors now.
        members: Those that go on; the others leave.
        devices: All that are gone, now or before.
        plan: As JSON.
        label: Version that all are set back to; None goes on with what they have.
        version, updates: Of the state from now on.
        has_grads: Gradients go with the tensors; otherwise none is left, not even those that a rank
            which leaves has not cleared.
        base, top: Least and most calls that a member has completed.
        lost_steps, lost_calls: Optimizer updates and training calls that are undone.
        error: Why nobody goes on; '' if they do.
        is_memory: It is for lack of memory.
    """

    participants: tuple[int, ...]
    members: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    plan: str = ""
    label: Version | None = None
    version: Version = Version(0, 0)
    updates: int = 0
    has_grads: bool = False
    base: int = 0
    top: int = 0
    lost_steps: int = 0
    lost_calls: int = 0
    error: str = ""
    is_memory: bool = False

    @classmethod
    def read(cls, fields: Sequence[Any]) -> Verdict:
        """Returns a verdict from JSON."""
        verdict = cls(*fields)
        return verdict._replace(
            participants=tuple(verdict.participants),
            members=tuple(verdict.members),
            devices=tuple(verdict.devices),
            label=None if verdict.label is None else Version(*verdict.label),
            version=Version(*verdict.version),
        )


def decide(
    reports: Mapping[int, Report],
    names: Collection[str],
    device_of: Sequence[str],
    replan: Callable[[tuple[str, ...], Mapping[int, Report]], str],
    silent: Collection[int] = (),
) -> Verdict:
    """Decides how to go on.

    Args:
        reports: By rank, of all that have joined.
        names: Tensors of the model.
        device_of: Name of each rank's device.
        replan: (devices that are gone, reports) -> the plan, as JSON; raises ValueError if none.
        silent: Ranks that may be alive behind a broken link, and decide for themselves.
    """
    participants = tuple(sorted(reports))
    members = tuple(rank for rank in participants if not reports[rank].is_leaving)
    nothing = Verdict(participants)
    if not members:
        return nothing._replace(error="all devices leave")
    if not _is_larger_part(participants, silent):
        return nothing._replace(
            error=f"no link leads to ranks {sorted(silent)}, which may go on by themselves"
        )
    devices = tuple(name for rank, name in enumerate(device_of) if rank not in members)
    top = max(report.position for report in reports.values())
    versions = {rank: _version(report, top) for rank, report in reports.items()}
    newest = max(versions.values())
    found = _restorable(reports, versions, names)
    if found is None:
        return nothing._replace(error=_missing(reports, versions, names, devices))
    label, updates = found
    try:
        plan = replan(devices, reports)
    except ValueError as error:
        return nothing._replace(error=str(error), is_memory=True)
    version = newest if label is None else label
    return Verdict(
        participants,
        members,
        devices,
        plan,
        label,
        version,
        updates,
        has_grads=any(reports[rank].has_grads for rank in members),
        base=min(r.position + r.is_complete(top) for r in reports.values()),
        top=top,
        lost_steps=max(report.updates for report in reports.values()) - updates,
        lost_calls=newest.calls - version.calls,
    )


def _is_larger_part(here: Sequence[int], silent: Collection[int]) -> bool:
    """Tells whether this part goes on after a split: the larger one, or that of the lowest rank."""
    if len(here) != len(silent):
        return len(here) > len(silent)
    return min(here) < min(silent)


def _version(report: Report, top: int) -> Version:
    """Returns the version of a rank's state, with its interrupted call if that counts as done."""
    steps, calls = report.version
    return Version(steps, calls + (report.kind == "train" and report.is_complete(top)))


def _restorable(
    reports: Mapping[int, Report], versions: Mapping[int, Version], names: Collection[str]
) -> tuple[Version | None, int] | None:
    """Returns (the newest state that all tensors are known of, optimizer updates until then)."""
    updates = max(report.updates for report in reports.values())
    if len(set(versions.values())) == 1:
        now = next(iter(versions.values()))
        here = {name for report in reports.values() for name in report.here}
        if set(names) <= here | _stored(reports, now):
            return None, updates
    stores = {s.version: s.updates for report in reports.values() for s in report.stores}
    for version in sorted(stores, reverse=True):
        if set(names) <= _stored(reports, version):
            return version, stores[version]
    return None


def _stored(reports: Mapping[int, Report], version: Version) -> set[str]:
    return {
        name
        for report in reports.values()
        for store in report.stores
        if store.version == version
        for name in store.names
    }


def _missing(
    reports: Mapping[int, Report],
    versions: Mapping[int, Version],
    names: Collection[str],
    devices: Sequence[str],
) -> str:
    here = {name for report in reports.values() for name in report.here}
    gone = [name for name in names if name not in here]
    what = f"{gone[0]} and {len(gone) - 1} other tensors" if gone else "one common state"
    has_any = any(report.stores for report in reports.values())
    return (
        f"without {', '.join(devices) or 'any device'} nobody has {what}: "
        + ("no snapshot was complete yet" if has_any else "no snapshot was taken")
        + "; set snapshot_interval, or give each stage a replica"
    )
