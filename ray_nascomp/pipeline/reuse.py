"""A run's use of the stage cache: what is taken from it, what is put there, and under which keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from ray_nascomp.compression.static import Rounded
from ray_nascomp.nni_adapter.output_forms import OutputForm
from ray_nascomp.nni_adapter.scales import ActivationScale, LayerScales
from ray_nascomp.pipeline.candidate import Candidate
from ray_nascomp.pipeline.measure import Quality
from ray_nascomp.pipeline.recipe import Recipe, code_digest
from ray_nascomp.pipeline.snapshot import Snapshot
from ray_nascomp.pipeline.stage_cache import Entry, StageCache
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import device_of, tensors_of
from ray_nascomp.tasks.data import Data

_FORMAT = 2
"""What entries hold; those of another format are not read."""
_QUALITIES = ("quality", "simulated")
_LIBRARIES = ("ray-nascomp", "torch", "nni", "torch-pruning", "onnx", "onnxscript", "onnxruntime")
_KNOWN_CODE = ("torch.", "transformers.", "ray_nascomp.")


@dataclass(frozen=True)
class KeptFile:
    """An exported file and what does not change when it is measured again.

    Attributes:
        content: The ONNX file.
        quality: See `Artifact`.
        error: See `Artifact`.
        simulated: What the network is worth under simulated integers.
        outputs: Layers whose output is quantized -> what reads it.
    """

    content: bytes
    quality: Quality
    error: float
    simulated: Quality
    outputs: dict[str, OutputForm]


class Reuse:
    """The stage cache as one task uses it.

    Args:
        cache: The cache.
        origin: What stages follow from besides their plan; see `origin_of`.

    Attributes:
        hits: Stages that were taken from the cache.
        misses: Stages that had to be carried out.
    """

    def __init__(self, cache: StageCache, origin: str) -> None:
        self._cache = cache
        self._origin = origin
        self.hits = 0
        self.misses = 0

    @cached_property
    def _machine(self) -> str:
        """What the last digits of sums depend on."""
        return f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"

    def longest(self, task: Task, plan: CompressionPlan, recipe: Recipe) -> tuple[Candidate | None, int]:
        """The candidate with most of the plan's stages but the last behind it, and how many these are."""
        for stages in range(len(recipe.stages) - 1, 0, -1):
            candidate = self._candidate(task, plan, recipe.structure(stages), recipe.stages[:stages])
            if candidate is not None:
                self.count(True, stages)
                self.count(False, len(recipe.stages) - stages)
                return candidate, stages
        self.count(False, len(recipe.stages))
        return None, 0

    def ready(self, task: Task, plan: CompressionPlan, recipe: Recipe) -> Candidate | None:
        """The compressed network with its batch statistics, if it is there."""
        candidate = self._candidate(task, plan, recipe.ready(), recipe.stages)
        if candidate is not None:
            self.count(True, len(recipe.stages))
        return candidate

    def trained(self, text: str, task: Task) -> Snapshot | None:
        """The state after an epoch, if it is there."""
        entry = self._cache.read(self._key(text, task))
        self.count(entry is not None)
        return Snapshot(entry.tensors, entry.facts) if entry is not None else None

    def keep(self, text: str, task: Task, snapshot: Snapshot) -> None:
        """Keeps a state."""
        self._cache.write(self._key(text, task), snapshot.tensors, snapshot.facts)

    def keep_candidate(self, text: str, task: Task, candidate: Candidate, ranks: Mapping[str, int]) -> None:
        """Keeps a candidate that has not been trained."""
        self.keep(text, task, Snapshot.of(candidate, ranks))

    def file(self, text: str, task: Task) -> KeptFile | None:
        """The exported file that was made from what the text says, if it is there; counts one stage."""
        entry = self._cache.read(self._key(text, task))
        self.count(entry is not None)
        if entry is None:
            return None
        qualities = {name: Quality(**entry.facts[name]) for name in _QUALITIES}
        return KeptFile(content=entry.tensors["file"].numpy().tobytes(), **{**entry.facts, **qualities})

    def keep_file(self, text: str, task: Task, file: KeptFile) -> None:
        """Keeps an exported file."""
        facts = {name: value for name, value in vars(file).items() if name != "content"}
        facts.update({name: vars(facts[name]) for name in _QUALITIES})
        tensor = torch.frombuffer(bytearray(file.content), dtype=torch.uint8)
        self._cache.write(self._key(text, task), {"file": tensor}, facts)

    @contextmanager
    def roundings(self, text: str, task: Task) -> Iterator[dict[tuple[str, int], Rounded]]:
        """(layer, bits) -> weights that were rounded before; what the block adds is kept as well."""
        entry = self._cache.read(self._key(text, task))
        known = _roundings(entry) if entry is not None else {}
        before = len(known)
        yield known
        if len(known) > before:
            self._cache.write(self._key(text, task), *_parts(known))

    def count(self, hit: bool, stages: int = 1) -> None:
        """Counts stages that were taken, or carried out."""
        self.hits += stages * hit
        self.misses += stages * (not hit)

    def _candidate(self, task: Task, plan: CompressionPlan, text: str, stages: tuple[str, ...]) -> Candidate | None:
        entry = self._cache.read(self._key(text, task))
        return Snapshot(entry.tensors, entry.facts).candidate(task, plan, stages) if entry is not None else None

    def _key(self, text: str, task: Task) -> str:
        parts = (self._origin, self._machine, device_of(task.model).type, text)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _parts(known: Mapping[tuple[str, int], Rounded]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Roundings as an entry's tensors and facts."""
    tensors, layers = {}, []
    for number, ((name, bits), rounded) in enumerate(known.items()):
        tensors[f"{number}.weight"] = rounded.weight.contiguous()
        tensors[f"{number}.scales"] = torch.from_numpy(rounded.scales.weight)
        inputs = rounded.scales.input
        layers.append([name, bits, None if inputs is None else [inputs.scale, inputs.zero_point]])
    return tensors, {"layers": layers}


def _roundings(entry: Entry) -> dict[tuple[str, int], Rounded]:
    known = {}
    for number, (name, bits, inputs) in enumerate(entry.facts["layers"]):
        scales = entry.tensors[f"{number}.scales"].numpy()
        read = None if inputs is None else ActivationScale(*inputs)
        known[name, bits] = Rounded(entry.tensors[f"{number}.weight"], LayerScales(scales, read, None, bits))
    return known


def origin_of(task: Task) -> str:
    """What all results on a task follow from, as a digest: weights, samples, code, versions of libraries.

    Of data that lie elsewhere (a Dataset that reads files) what tells them counts, not the files.
    """
    versions = {name: version(name) for name in _LIBRARIES}
    digest = hashlib.sha256(json.dumps([_FORMAT, task.fingerprint, task.batch_size, versions]).encode())
    for data in (task.train_data, task.val_data, task.calibration_data):
        digest.update(_data_digest(data).encode() if data is not None else b"none")
    modules = {type(module) for module in task.model.modules()}
    code: list[Any] = [kind for kind in modules if not kind.__module__.startswith(_KNOWN_CODE)]
    code += [task._loss, task._metric_function, *([task.build] if task.build is not None else [])]
    for text in sorted(map(code_digest, code)):
        digest.update(text.encode())
    return digest.hexdigest()


def _data_digest(data: Data) -> str:
    if data._tensors is None:
        return hashlib.sha256(cloudpickle.dumps((data._dataset, data._collate))).hexdigest()
    digest = hashlib.sha256()
    inputs, targets = data._tensors
    for name, tensor in {**tensors_of(inputs), "targets": targets}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
