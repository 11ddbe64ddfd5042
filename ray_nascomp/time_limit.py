"""A time limit of a trial's own: one that hangs fails, says where, and frees its place."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune

from ray_nascomp.errors import ConfigError, TrialTimeoutError

_GRACE = 30.0
"""Seconds after which a process that does not come back from native code is ended."""


def time_limited(trainable: type[tune.Trainable], seconds: float) -> type[tune.Trainable]:
    """A class trainable whose trials fail when their setup, or all their steps together, take too long.

    Python code is interrupted where it is, with a `TrialTimeoutError` whose trace is the trial's
    error. Native code cannot be interrupted: half a minute later the worker ends, with the stacks
    of all its threads in its log. Either way Tune retries or gives up as `FailureConfig` says.

    Args:
        trainable: A class trainable.
        seconds: The limit, above 0; time of earlier workers counts, waiting for a place does not.

    Raises:
        ConfigError: If an argument is not allowed.
    """
    if not (isinstance(trainable, type) and issubclass(trainable, tune.Trainable)):
        raise ConfigError(f"trainable: {trainable!r} was given, a class derived from tune.Trainable is allowed")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(f"seconds (time_limit_s): {seconds!r} was given, a positive number is allowed")

    class TimeLimited(trainable):  # type: ignore[misc, valid-type]
        def setup(self, config: dict[str, Any], **parameters: Any) -> None:
            with deadline(seconds, f"the trial's setup took longer than its limit of {seconds:g} s"):
                super().setup(config, **parameters)

        def step(self) -> dict[str, Any]:
            message = f"the trial took longer than its limit of {seconds:g} s, in step {self._iteration + 1}"
            with deadline(seconds - self._time_total, message):
                return dict(super().step())

    TimeLimited.__name__ = TimeLimited.__qualname__ = trainable.__name__
    TimeLimited.__doc__ = trainable.__doc__
    return TimeLimited


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Raises in the main thread once the time is over; elsewhere only the process's end is left.

    Raises:
        TrialTimeoutError: With the message.
    """
    if seconds <= 0:
        raise TrialTimeoutError(message)

    def raise_error(signum: int, frame: Any) -> None:
        raise TrialTimeoutError(message)

    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGALRM, raise_error) if is_main else None
    if is_main:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
