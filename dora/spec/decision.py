"""What the adapter goes by, and what it decides: conditions, forecasts, moves, a decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from dora.spec.base import Fraction, Spec
from dora.spec.plan import Plan


class Conditions(NamedTuple):
    """How fast media and devices are now, over what the cluster says.

    Attributes:
        factors: (name of a medium or device, factor), sorted; 0 is gone, not named is as given.
        delays: (name of a medium, factor of its latency), sorted.
    """

    factors: tuple[tuple[str, float], ...] = ()
    delays: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(
        cls, factors: Mapping[str, float], delays: Mapping[str, float] | None = None
    ) -> Conditions:
        """Returns the conditions of those factors."""
        return cls(tuple(sorted(factors.items())), tuple(sorted((delays or {}).items())))


class Forecast(NamedTuple):
    """What one step or request of a plan takes under some conditions.

    Attributes:
        excess: Per bound of the QoE, by which factor it is reached; above 1 it is broken.
        battery_j: Joules from batteries alone.
    """

    time_s: float
    energy_j: float
    excess: tuple[float, ...] = ()
    battery_j: float = 0.0

    @property
    def worst(self) -> float:
        """The largest excess; 0 without bounds."""
        return max(self.excess, default=0.0)

    def value(self, objective: str) -> float:
        """Returns the seconds or the joules."""
        return self.time_s if objective == "time" else self.energy_j


# None: the plan can not run, because a device or a medium of it has gone.
Predict = Callable[[Plan, Conditions], Forecast | None]


class Move(NamedTuple):
    """One block that a device gets from another one."""

    block: int
    src: str
    dst: str
    num_bytes: int


class Migration(NamedTuple):
    """The way from one placement to another.

    Attributes:
        moves: In the order in which they should be made.
        lost: Blocks that nobody holds any more, or whose way is cut off; until that is better they
            come from a snapshot or a checkpoint.
        kept_bytes: What the devices of the new placement hold already.
        transfer_s: Least time in which the network carries the moves; inf if any block is lost.
    """

    moves: tuple[Move, ...] = ()
    lost: tuple[tuple[int, str], ...] = ()
    kept_bytes: int = 0
    transfer_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes to move."""
        return sum(move.num_bytes for move in self.moves)


class SwitchCost(NamedTuple):
    """What changing to another plan costs.

    Attributes:
        pause_s: In which no step or request goes on.
        background_s: Before that, while work goes on with the old plan.
        energy_j: Of the radios.
    """

    pause_s: float = 0.0
    background_s: float = 0.0
    energy_j: float = 0.0


DecisionKind = Literal["keep", "reschedule", "shift", "switch", "mix", "replan"]


class Decision(Spec):
    """What the adapter wants done next, and why.

    Attributes:
        kind: From cheap to dear: go on; the same plan with its transfers ordered anew; the same
            placement with other shares; another plan; several plans in turn; search anew.
        plans: The plan to run, or the plans to mix; empty for keep, reschedule and replan.
        weights: Share of steps or requests of each plan in a mix.
        prepare: Plans whose weights should be put in place in the background, as a way out.
        is_replanning: Search for new plans in the background too, whatever the kind.
    """

    kind: DecisionKind
    reason: str
    plans: tuple[Plan, ...] = ()
    weights: tuple[Fraction, ...] = ()
    prepare: tuple[Plan, ...] = ()
    is_replanning: bool = False
