"""What it does to a model when each group and layer alone is compressed: a table, measured once.

Adaptive quantization allocates bits by it, searchers can take it as a prior. The data are those for
calibration, never the validation data. The increase of the loss is what counts in the end, but on
few samples chance moves it both ways; the distortion of the outputs tells small changes apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_nascomp.compression.probes import (
    Bench,
    Effect,
    Probe,
    ProbeKind,
    effect_of,
    loss_of,
    make_bench,
    possible_probes,
)
from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

HOPELESS = 1e9
"""Increase of the loss, or distortion, that stands for an infinite one."""

_IDENTITY: dict[str, float] = {"sparsity": 0.0, "bits": 32.0, "rank": 1.0}
_JOBS_A_CPU = 4
_PATIENCE = 30.0
"""Seconds without a result from Ray after which this process measures too."""


@dataclass(frozen=True)
class Sensitivity:
    """Effects on the outputs and the mean loss on calibration data.

    Attributes:
        loss: The loss of the model as it is.
        measured: Each probe -> what it does.
    """

    loss: float
    measured: dict[Probe, Effect]

    def of(self, kind: ProbeKind, name: str, setting: float) -> float:
        """The increase of the loss at any setting, between measured ones by a straight line.

        Args:
            kind: "sparsity", "bits" or "rank".
            name: Name of the group or the layer.
            setting: As in `Probe`; beyond the measured range the nearest measured one counts.

        Raises:
            ConfigError: If nothing was measured of the group or the layer.
        """
        import numpy as np

        points = self.table(kind).get(name)
        if points is None:
            raise ConfigError.unknown(f"sensitivity: {kind} of", name, self.table(kind))
        settings, increases = zip(*sorted({**points, _IDENTITY[kind]: 0.0}.items()), strict=True)
        return float(np.interp(setting, settings, increases))

    def table(self, kind: ProbeKind) -> dict[str, dict[float, float]]:
        """Name -> setting -> increase of the loss, in the model's order."""
        return self._tables["loss"].get(kind, {})

    def distortions(self, kind: ProbeKind) -> dict[str, dict[float, float]]:
        """Name -> setting -> distortion of the outputs, in the model's order."""
        return self._tables["distortion"].get(kind, {})

    def expected(self, config: Mapping[str, Any]) -> float:
        """What a config is expected to do to the outputs: the sum of what each of its settings does alone.

        A prior for searchers, such as `GreedySearch(prior=table.expected)`.

        Args:
            config: A config; groups and layers of which nothing was measured count for nothing.
        """
        import numpy as np

        total = 0.0
        sections = (("sparsity", "prune"), ("bits", "quantize"), ("rank", "low_rank"))
        for kind, stage in sections:
            given = config.get(stage, {}).get(kind, {})
            for name, points in self.distortions(cast(ProbeKind, kind)).items():
                value = given.get(name, given.get("*", _IDENTITY[kind])) if isinstance(given, Mapping) else given
                settings, effects = zip(*sorted({**points, _IDENTITY[kind]: 0.0}.items()), strict=True)
                total += float(np.interp(value, settings, effects))
        return total

    def rows(self) -> Iterator[tuple[ProbeKind, str, float, float, float]]:
        """All (kind, name, setting, increase of the loss, distortion)."""
        return ((p.kind, p.name, p.setting, effect.loss, effect.distortion) for p, effect in self.measured.items())

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps({"loss": self.loss, "rows": list(self.rows())})

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The table of `to_json`."""
        data = json.loads(text)
        measured = {Probe(*probe): Effect(loss, distortion) for *probe, loss, distortion in data["rows"]}
        return cls(data["loss"], measured)

    @cached_property
    def _tables(self) -> dict[str, dict[str, dict[str, dict[float, float]]]]:
        tables: dict[str, dict[str, dict[str, dict[float, float]]]] = {"loss": {}, "distortion": {}}
        for kind, name, setting, loss, distortion in self.rows():
            for what, value in (("loss", loss), ("distortion", distortion)):
                tables[what].setdefault(kind, {}).setdefault(name, {})[setting] = value
        return tables


def measure_sensitivity(
    task: Task,
    *,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    bits: Sequence[int] = (4, 8),
    ranks: Sequence[float] = (0.25, 0.5),
    folder: str | Path | None = None,
) -> Sensitivity:
    """Compresses each group and layer of the task's own model alone and measures what it does, without training.

    Channels and heads go by their L1 norm; 8 bits quantize a layer's inputs too, fewer its weight
    alone; low ranks are weighted by the layer's inputs. In a driver with Ray initialised the probes
    run as Ray tasks of one CPU each, otherwise, or where no CPU is free, in this process.

    Args:
        task: The task.
        sparsities: Shares of a group's units to remove, in (0, 1).
        bits: Bits of a layer's weight, 1 to 8.
        ranks: Ranks as shares of the largest that saves parameters, in (0, 1).
        folder: Where the table is kept for the next time; nowhere if absent.

    Raises:
        ConfigError: For a setting out of range.
        UntraceableModelError: If the model does not run on its own inputs.
    """
    _check("sparsities", sparsities, 0, 1, "between 0 and 1")
    _check("bits", bits, 0, 9, "that are whole, 1 to 8,")
    _check("ranks", ranks, 0, 1, "between 0 and 1")
    loss = loss_of(task)
    probes = possible_probes(task, sparsities, bits, ranks)
    path = Path(folder) / f"sensitivity_{_key(task, probes)}.json" if folder is not None else None
    if path is not None and path.exists():
        found = Sensitivity.from_json(path.read_text())
        # Another loss or other data with the same weights have another loss.
        if math.isclose(found.loss, loss, rel_tol=1e-3, abs_tol=1e-6):
            return found
    effects = map(_finite, _measure(make_bench(task, probes), probes))
    table = Sensitivity(loss, dict(zip(probes, effects, strict=True)))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(table.to_json())
        partial.replace(path)
    return table


def _check(key: str, values: Iterable[float], lower: float, upper: float, allowed: str) -> None:
    for value in values:
        if not lower < value < upper or (key == "bits" and value != int(value)):
            raise ConfigError(f"{key}: {value!r} was given, numbers {allowed} are allowed")


def _key(task: Task, probes: Sequence[Probe]) -> str:
    settings = json.dumps([(probe.kind, probe.name, probe.setting) for probe in probes])
    return f"{task.fingerprint}_{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _finite(effect: Effect) -> Effect:
    loss, distortion = (value if math.isfinite(value) else HOPELESS for value in (effect.loss, effect.distortion))
    return Effect(loss, distortion)


def _measure(bench: Bench, probes: Sequence[Probe]) -> list[Effect]:
    import ray

    # A trial holds the CPUs that its own tasks would wait for.
    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.SCRIPT_MODE:
        return [effect_of(bench, probe) for probe in probes]
    from ray_nascomp.tasks.transport import pack

    packed = ray.put(pack(bench))
    remote = ray.remote(num_cpus=1)(_effects)
    jobs = max(1, int(ray.cluster_resources().get("CPU", 1)) * _JOBS_A_CPU)
    parts = [list(probes[start::jobs]) for start in range(min(jobs, len(probes)))]
    pending = {remote.remote(packed, part): part for part in parts}
    effects: dict[Probe, Effect] = {}
    patience = _PATIENCE
    while pending:
        ready, _ = ray.wait(list(pending), timeout=patience)
        if ready:
            part = pending.pop(ready[0])
            effects.update(zip(part, ray.get(ready[0]), strict=True))
        else:
            # Trials that hold all CPUs may wait for this very process, so it does not only wait.
            patience = 0.0
            reference, part = pending.popitem()
            ray.cancel(reference)
            effects.update((probe, effect_of(bench, probe)) for probe in part)
    return [effects[probe] for probe in probes]


def _effects(packed: Any, probes: Sequence[Probe]) -> list[Effect]:
    """What a Ray task does."""
    from ray_nascomp.tasks.transport import unpack

    bench = cast(Bench, unpack(packed))
    return [effect_of(bench, probe) for probe in probes]
