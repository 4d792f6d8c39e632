"""What was decided, when and why: one JSON object per line, for people and for `dora top`."""

from __future__ import annotations

import json

from dora.adapter.monitor import View
from dora.spec import Decision, Forecast, Plan, Spec
from dora.spec.base import Index, NonNegative


class Seen(Spec):
    """What one medium or device was estimated at."""

    name: str
    factor: NonNegative
    spread: NonNegative


class Event(Spec):
    """One decision with what it rests on.

    Attributes:
        step: Steps or requests done before it.
        decision: With its reason, and the plans if there are any.
        seen: What differs from the cluster by more than its noise, or has changed.
        gone: Devices that are away.
        time_s, energy_j, worst: What the plan is expected to take, and its largest excess.
    """

    at_s: float
    step: Index = 0
    decision: Decision
    seen: tuple[Seen, ...] = ()
    gone: tuple[str, ...] = ()
    time_s: NonNegative | None = None
    energy_j: NonNegative | None = None
    worst: NonNegative | None = None

    def line(self) -> str:
        """Returns one line of JSON, with plans shortened to who runs which blocks."""
        body = self.model_dump(mode="json", exclude_none=True, exclude={"decision"})
        said = self.decision
        shown = {"kind": said.kind, "reason": said.reason}
        if said.plans:
            shown["plans"] = [placement(plan) for plan in said.plans]  # type: ignore[assignment]
        if said.weights:
            shown["weights"] = [round(w, 4) for w in said.weights]  # type: ignore[assignment]
        if said.is_replanning:
            shown["is_replanning"] = True  # type: ignore[assignment]
        return json.dumps({"at_s": self.at_s, "decision": shown, **body})


def event(
    decision: Decision, view: View, *, step: int = 0, forecast: Forecast | None = None
) -> Event:
    """Returns the event of a decision that was made on a view."""
    seen = tuple(
        Seen(name=name, factor=round(e.factor, 4), spread=round(e.spread, 4))
        for name, e in sorted(view.estimates.items())
        if e.num_seen and (name in view.changed or abs(e.factor - 1) > e.spread)
    )
    return Event(
        at_s=view.at_s,
        step=step,
        decision=decision,
        seen=seen,
        gone=tuple(sorted(view.gone)),
        time_s=forecast.time_s if forecast else None,
        energy_j=forecast.energy_j if forecast else None,
        worst=forecast.worst if forecast else None,
    )


def placement(plan: Plan) -> str:
    """Returns for example 'phone 0-3 | laptop + hub 4-11'."""
    return " | ".join(
        f"{' + '.join(r.device for r in stage.replicas)} {stage.first_block}-{stage.last_block}"
        for stage in plan.stages
    )
