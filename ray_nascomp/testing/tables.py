"""Trainables that look their results up: searches of hundreds of trials in seconds.

The same searcher and scheduler code runs as with real training, after Klein et al. 2019 and
Salinas et al. 2022 (Syne Tune's simulated back end).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.recorded import recorded

LookUp = Callable[[Mapping[str, Any]], Sequence[Mapping[str, float]]]
"""Function from a config to its learning curve: one dict of metrics for each step, one step or more."""


def table_function(look_up: LookUp) -> Callable[[dict[str, Any]], None]:
    """A function trainable that reports a config's learning curve; its last row says `final`.

    Args:
        look_up: See `LookUp`. It is pickled into the trial.
    """

    def replay(config: dict[str, Any]) -> None:
        curve = _curve(look_up, config)
        for step, metrics in enumerate(curve, start=1):
            tune.report({**metrics, "final": step == len(curve)})

    return replay


def table_trainable(look_up: LookUp) -> type[tune.Trainable]:
    """A class trainable that reports a config's learning curve, and can be paused, resumed and reused.

    The trial ends without a doubled row: every result reaches the scheduler and the searcher. Its
    reports are `recorded`: they outlive the driver.

    Args:
        look_up: See `LookUp`. It is pickled into the trial.
    """

    class TableTrainable(tune.Trainable):
        """Replays a learning curve."""

        def setup(self, config: dict[str, Any]) -> None:
            self._position = 0
            self._curve = _curve(look_up, config)

        def step(self) -> dict[str, Any]:
            if self._position >= len(self._curve):
                return {"__duplicate__": True, "done": True}
            metrics = self._curve[self._position]
            self._position += 1
            return {**metrics, "final": self._position == len(self._curve)}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {"position": self._position}

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            self._position = int((checkpoint or {}).get("position", 0))

    return recorded(TableTrainable)


def _curve(look_up: LookUp, config: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    curve = look_up(config)
    if not curve:
        raise ConfigError(f"look_up: no step was given for {dict(config)!r}, one or more is allowed")
    return curve
