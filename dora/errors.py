"""The exceptions that Dora raises on purpose, so that callers can catch each kind by name."""


class DoraError(Exception):
    """Base class of every error below."""


class SpecError(DoraError, ValueError):
    """A file or value from the user is not valid.

    The message is one line: where, what was given, what is allowed.
    """


class InfeasiblePlanError(DoraError, ValueError):
    """No plan meets the limits; the message names the limit and what would meet it."""


class PartitionError(DoraError, ValueError):
    """The module can not be cut as asked; the message says why and what can be done."""


class ScheduleError(DoraError, ValueError):
    """A schedule deadlocks, misses a send or receive, or exceeds its memory bound."""


class PeerLostError(DoraError, RuntimeError):
    """A peer failed, went silent or closed its connection; names rank, peer and action."""


class ProtocolError(DoraError, RuntimeError):
    """Ranks disagree about what they run: step, batch shape, plan or mode."""
