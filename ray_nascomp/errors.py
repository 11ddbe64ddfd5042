"""The exceptions of ray-nascomp: what is the user's mistake, and what is merely infeasible."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A wrong value from the user, found before any work is spent.

    The message names the key, what was given and what is allowed.
    """

    @classmethod
    def unknown(cls, what: str, given: object, allowed: Iterable[object]) -> ConfigError:
        """The error for a name that is not one of `allowed`."""
        names = ", ".join(repr(name) for name in allowed) or "nothing"
        return cls(f"{what}: {given!r} is unknown; allowed: {names}")


class MissingMetricError(ConfigError):
    """A goal's metric that the trial does not report."""


class UntraceableModelError(RuntimeError):
    """A model whose structure cannot be found by tracing it."""


class TrialTimeoutError(RuntimeError):
    """A trial that took longer than its time limit."""


class InfeasibleError(Exception):
    """A valid plan that cannot be carried out on this model.

    A trial turns it, and nothing else, into an infeasible result with its reason.
    """


class LayerCollapsedError(InfeasibleError):
    """A layer would be left without channels."""


class NonFiniteModelError(InfeasibleError):
    """Compression or training left the model with NaN or infinite outputs."""
