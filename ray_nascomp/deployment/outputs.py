"""Which layers' outputs are quantized, for what reads them, and where.

ONNX Runtime computes a convolution in integers only where its output becomes integers too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx

from ray_nascomp.deployment.gates import find_gates
from ray_nascomp.deployment.layer_nodes import LayerNode, layer_nodes
from ray_nascomp.deployment.readers import Readers
from ray_nascomp.nni_adapter.output_forms import OutputForm
from ray_nascomp.nni_adapter.scales import ActivationScale, Calibration

_HARD_FORMS: dict[str, OutputForm] = {"HardSigmoid": "hard_sigmoid", "HardSwish": "hard_swish"}


def unfollowed_convolutions(
    proto: onnx.ModelProto, weights: Mapping[str, np.ndarray], quantized: Collection[str]
) -> dict[str, OutputForm]:
    """Quantized convolutions whose output no quantized layer takes as its input -> what reads it.

    Args:
        proto: The exported model in floating point.
        weights: Layer name -> torch weight, of all compressible layers.
        quantized: Names of the layers whose inputs will be quantized.
    """
    found = list(layer_nodes(proto.graph, {name: weights[name] for name in quantized}))
    readers = Readers(proto.graph, found, through_joins=True)
    followers = followers_of(found, readers)
    hard = {gate.layer: gate.operator for gate in find_gates(proto.graph, found) if gate.is_hard}
    convolutions = [entry for entry in found if entry.node.op_type == "Conv"]
    forms: dict[str, set[OutputForm]] = {}
    for entry in convolutions:
        _, is_positive = readers.last_alone(entry.node.output[0])
        form = "positive" if is_positive else _HARD_FORMS.get(hard.get(entry.index, ""), "plain")
        forms.setdefault(entry.layer, set()).add(form)
    unfollowed = {entry.layer for entry in convolutions if followers[entry.index] is None}
    # A layer that is used twice has one scale for both.
    return {layer: form if not others else "plain" for layer, (form, *others) in forms.items() if layer in unfollowed}


def followers_of(layers: Iterable[LayerNode], readers: Readers) -> dict[int, tuple[str, ...] | None]:
    """Position of a convolution, or a linear layer with a bias -> the layers that read its output, as `readers` says.

    Args:
        layers: The graph's layers.
        readers: Who reads what.
    """
    return {entry.index: readers.of(entry.node.output[0]) for entry in layers if entry.node.op_type in ("Conv", "Gemm")}


def output_places(
    found: list[LayerNode], calibration: Calibration, readers: Readers
) -> dict[int, tuple[int, ActivationScale]]:
    """Position of a layer's node -> position of the node behind which its output is quantized, and the scale.

    That is the layer itself, or the last of the ReLUs and poolings that alone read it: ONNX Runtime has a ReLU in its
    convolution, and takes maxima of integers.

    Args:
        found: The graph's layers.
        calibration: Layer name -> scales.
        readers: Who reads what.
    """
    places = {}
    for entry in found:
        scale = calibration[entry.layer].output
        if scale is None:
            continue
        index, is_positive = readers.last_alone(entry.node.output[0])
        # Behind a ReLU what has two signs would leave half of the integers unused.
        if index is None or is_positive != (scale.zero_point == 0):
            index = entry.index
        places[entry.index] = (index, scale)
    return places
