"""Shows what the demo's processes report on the console that the command line hands in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dora import views
from dora.demo.launch import DemoError
from dora.spec import Plan

# Previews shown of the plans that the planner kept.
_MAX_PLANS = 3
# Without a terminal, one line each time that this share of a phase is done.
_LINES = 5


class Screen:
    """Progress bars on a terminal, plain lines elsewhere; a context manager.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task("starting the processes", total=None, note="")
        self._total = 0

    def __enter__(self) -> Screen:
        """Starts the bars."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the bars."""
        self._bars.stop()

    def show(self, events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Shows events as they come; returns the result among them."""
        shown = {"planned": self._planned, "phase": self._phase, "progress": self._progress}
        result = None
        for event in events:
            if event["event"] == "result":
                result = dict(event)
            else:
                shown[event["event"]](event)
        self._finish()
        if result is None:
            raise DemoError("the processes ended without a result")
        return result

    def _planned(self, event: Mapping[str, Any]) -> None:
        plans = [Plan.from_json(text) for text in event["candidates"]]
        self._console.print("\nWhat the planner proposes; the first one runs:")
        self._console.print(views.plan_table(plans[:_MAX_PLANS], None, "step"))
        self._console.print()

    def _phase(self, event: Mapping[str, Any]) -> None:
        self._finish()
        self._total = event.get("total", 0)
        self._task = self._bars.add_task(event["name"], total=self._total or None, note="")
        if not self._console.is_terminal:
            self._console.print(event["name"])

    def _progress(self, event: Mapping[str, Any]) -> None:
        note = f"loss {event['loss']:.3f}" if "loss" in event else ""
        self._bars.update(self._task, completed=event["done"], note=note)
        is_due = event["done"] % max(1, self._total // _LINES) == 0
        if is_due and not self._console.is_terminal:
            self._console.print(f"  {event['done']}/{self._total} {note}".rstrip())

    def _finish(self) -> None:
        """Marks the bar of the current phase as full."""
        total = self._total or 1
        self._bars.update(self._task, total=total, completed=total)
