"""A model with one thing compressed at a time, so that what each costs in quality can be told.

Everything that probes share (which channels go, covariances, scales) is found once, on
calibration data; after that a probe is a copy, one change and one pass over that data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ray_nascomp.costs.factor_shapes import max_useful_rank
from ray_nascomp.quantizers import bits_for

if TYPE_CHECKING:
    from ray_nascomp.nni_adapter.scales import Calibration, LayerScales
    from ray_nascomp.tasks.base import Task

ProbeKind = Literal["sparsity", "bits", "rank"]
_METHOD = "l1_norm"
_SMOOTHING_BATCHES = 8
_SAMPLES = 256
"""Samples that the loss is told on; probes and the model as it is see the same ones."""


@dataclass(frozen=True)
class Probe:
    """One thing to compress.

    Attributes:
        kind: "sparsity" of a group, "bits" or "rank" of a layer.
        name: Name of the group or the layer.
        setting: Share of units to remove, in (0, 1); bits of the weight, 1 to 8; rank as a share of
            the largest that saves parameters, in (0, 1).
    """

    kind: ProbeKind
    name: str
    setting: float


@dataclass(frozen=True)
class Effect:
    """What a probe does.

    Attributes:
        loss: Increase of the mean loss; negative where it falls, as it may by chance.
        distortion: Squared change of the outputs as a share of their square, 0 or more. Those of
            independent small changes add up.
    """

    loss: float
    distortion: float


@dataclass
class Bench:
    """A task's model and what probes of it need.

    Attributes:
        task: The task.
        outputs: The outputs of the model as it is, one tensor a batch.
        loss: Its mean loss.
        removed: Probe of a sparsity -> units to remove.
        ranks: Probe of a rank -> the rank.
        covariances: Layer name -> second moments of its inputs, for ranks.
        folded: The model with batch normalisations folded and, if it is a transformer, inputs of
            linear layers smoothed; in floating point.
        names: Layer name -> its name in `folded`, where that is another.
        scales: Name in `folded` -> scales at 8 bits.
        rounded: Name in `folded` -> the weight at 8 bits.
    """

    task: Task
    outputs: list[Tensor]
    loss: float
    removed: dict[Probe, list[int]] = field(default_factory=dict)
    ranks: dict[Probe, int] = field(default_factory=dict)
    covariances: dict[str, Tensor] = field(default_factory=dict)
    folded: nn.Module | None = None
    names: dict[str, str] = field(default_factory=dict)
    scales: Calibration = field(default_factory=dict)
    rounded: dict[str, Tensor] = field(default_factory=dict)


def possible_probes(
    task: Task, sparsities: Iterable[float], bits: Iterable[int], ranks: Iterable[float]
) -> list[Probe]:
    """All probes of a model that change it: a group keeps a unit, a rank saves parameters."""
    spec = task.spec
    probes = [
        Probe("sparsity", group.name, share)
        for group in spec.prunable_groups
        for share in sparsities
        if 0 < _units_to_remove(share, group.width) < group.width
    ]
    for layer in spec.quantizable_layers:
        offered = dict.fromkeys(bits_for(layer.kind, value) for value in bits)
        probes += [Probe("bits", layer.name, value) for value in offered]
    for layer in spec.layers:
        if layer.factorisable and max_useful_rank(layer.weight_shape, layer.kind):
            probes += [Probe("rank", layer.name, share) for share in ranks]
    return probes


def make_bench(task: Task, probes: Iterable[Probe]) -> Bench:
    """Finds what the probes need.

    Args:
        task: The task; its model stays as it is.
        probes: Of `possible_probes`.
    """
    bench = Bench(task, *_run(task, task.network({})))
    by_kind: dict[str, list[Probe]] = {"sparsity": [], "bits": [], "rank": []}
    for probe in probes:
        by_kind[probe.kind].append(probe)
    _choose_units(bench, by_kind["sparsity"])
    _quantize(bench, by_kind["bits"])
    if by_kind["rank"]:
        from ray_nascomp.compression.low_rank import input_covariances

        layers = {layer.name: layer for layer in task.spec.layers}
        for probe in by_kind["rank"]:
            largest = max_useful_rank(layers[probe.name].weight_shape, layers[probe.name].kind)
            bench.ranks[probe] = min(largest, max(1, round(probe.setting * largest)))
        names = dict.fromkeys(probe.name for probe in by_kind["rank"])
        bench.covariances = input_covariances(task.network({}), names, task.calibration_batches())
    return bench


def effect_of(bench: Bench, probe: Probe) -> Effect:
    """What the one change does on calibration data, 256 samples at most; infinite where that is not finite.

    Args:
        bench: Made for this probe, among others.
        probe: The change.
    """
    outputs, loss = _run(bench.task, _changed(bench, probe))
    pairs = list(zip(outputs, bench.outputs, strict=True))
    change = sum(float((ours - original).double().square().sum()) for ours, original in pairs)
    size = sum(float(original.double().square().sum()) for _, original in pairs)
    distortion = change / max(size, 1e-12)
    return Effect(loss - bench.loss, distortion if math.isfinite(distortion) else math.inf)


def loss_of(task: Task) -> float:
    """The mean loss of the task's own model, as `effect_of` compares with it."""
    return _run(task, task.network({}))[1]


def _changed(bench: Bench, probe: Probe) -> nn.Module:
    from ray_nascomp.compression.batch_norm import reestimate_batch_norm

    if probe.kind == "bits":
        return _with_bits(bench, probe)
    network = bench.task.network({})
    if probe.kind == "sparsity":
        _remove(network, bench.task, probe.name, bench.removed[probe])
    else:
        from ray_nascomp.compression.low_rank import factorise

        factorise(network, {probe.name: bench.ranks[probe]}, bench.covariances)
    reestimate_batch_norm(network, bench.task.calibration_batches())
    return network


def _run(task: Task, network: nn.Module) -> tuple[list[Tensor], float]:
    """Outputs and mean loss."""
    predict = task.predict(network)
    outputs: list[Tensor] = []
    total, count = 0.0, 0
    for inputs, targets in task.calibration_batches():
        outputs.append(predict(inputs))
        total += float(task.loss(outputs[-1], targets)) * len(targets)
        count += len(targets)
        if count >= _SAMPLES:
            break
    return outputs, total / count if math.isfinite(total) else math.inf


def _units_to_remove(share: float, width: int) -> int:
    return math.floor(share * width + 0.5 + 1e-9)


def _choose_units(bench: Bench, probes: list[Probe]) -> None:
    """Groups do not influence each other's choice, so one call tells that of all of them."""
    if not probes:
        return
    from ray_nascomp.nni_adapter.pruning import channels_to_remove

    task = bench.task
    groups = {group.name: group for group in task.spec.prunable_groups}
    network = task.network({})
    for share in dict.fromkeys(probe.setting for probe in probes):
        names = [probe.name for probe in probes if probe.setting == share]
        counts = {name: (groups[name], _units_to_remove(share, groups[name].width)) for name in names}
        for name, units in channels_to_remove(network, task, _METHOD, counts, 0, task.spec).items():
            bench.removed[Probe("sparsity", name, share)] = units


def _remove(network: nn.Module, task: Task, name: str, units: list[int]) -> None:
    from ray_nascomp.compression.attention import find_attentions, remove_heads
    from ray_nascomp.compression.graph import remove_channels

    group = next(group for group in task.spec.groups if group.name == name)
    if group.is_heads:
        attention = next(found for found in find_attentions(network) if found.name == name)
        remove_heads(network, attention, units)
    else:
        remove_channels(network, task.example_inputs, {group.layers[0]: units})


def _quantize(bench: Bench, probes: list[Probe]) -> None:
    """Folds, smooths, and finds what 8 bits look like; fewer bits follow from the weights alone."""
    if not probes:
        return
    from ray_nascomp.compression.attention import find_attentions
    from ray_nascomp.compression.fold import fold_batch_norm
    from ray_nascomp.compression.smooth import ALPHAS, smooth
    from ray_nascomp.compression.static import calibrate_layers
    from ray_nascomp.nni_adapter.quantization import QuantizationSession

    task = bench.task
    network = task.network({}).cpu().eval()
    fold_batch_norm(network, task.example_inputs)
    quantized = dict.fromkeys(probe.name for probe in probes if probe.setting == 8)
    eight = [name for name in quantized if not isinstance(network.get_submodule(name), nn.RNNBase)]
    linear = [name for name in eight if type(network.get_submodule(name)) is nn.Linear]
    batches = [inputs for (inputs, _), _ in zip(task.calibration_batches(), range(_SMOOTHING_BATCHES), strict=False)]
    if linear and find_attentions(network):
        bench.names = smooth(network, linear, batches, ALPHAS)
    bench.folded = network
    if not eight:
        return
    rounded = copy.deepcopy(network)
    bits = {bench.names.get(name, name): 8 for name in eight}
    known = calibrate_layers(rounded, bits, batches)
    session = QuantizationSession(rounded, task, bits, {}, start=known)
    bench.scales = session.calibration()
    session.close()
    for name, scales in bench.scales.items():
        weight: Any = rounded.get_submodule(name).weight
        bench.rounded[name] = _rounded(weight, scales)


def _rounded(weight: Tensor, scales: LayerScales) -> Tensor:
    integers = torch.from_numpy(scales.integers(weight.detach().numpy())).float()
    return integers * torch.from_numpy(scales.weight).reshape(-1, *[1] * (integers.dim() - 1))


def _with_bits(bench: Bench, probe: Probe) -> nn.Module:
    from ray_nascomp.compression.rounding import round_affine

    network = copy.deepcopy(bench.folded)
    assert network is not None
    name = bench.names.get(probe.name, probe.name)
    module: Any = network.get_submodule(name)
    if probe.setting == 8 and name in bench.scales:
        module.weight.data.copy_(bench.rounded[name])
        observed = bench.scales[name].input
        if observed is not None:
            scale, zero = observed.scale, observed.zero_point
            module.register_forward_pre_hook(lambda _, inputs: (round_affine(inputs[0], scale, zero), *inputs[1:]))
        return network
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.startswith("weight"):
            parameter.data.copy_(_rounded(parameter, _weight_scales(parameter, int(probe.setting))))
    return network


def _weight_scales(weight: Tensor, bits: int) -> LayerScales:
    """Scales of a weight that is stored in few bits and computed with in floating point."""
    from ray_nascomp.compression.rounding import channel_scales
    from ray_nascomp.nni_adapter.scales import LayerScales

    rows = weight.detach().flatten(1)
    # One bit holds signs, which stand for the mean magnitude.
    scales = rows.abs().mean(1) if bits == 1 else channel_scales(rows, 2 ** (bits - 1) - 1)
    return LayerScales(scales.numpy(), None, None, bits)
