from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, with_large_weights
from onnx import numpy_helper

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.deployment.compact import _short_name, compact
from ray_nascomp.deployment.export import ExportError, export_onnx
from ray_nascomp.deployment.outputs import unfollowed_convolutions
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.runtime import compare_latency, make_session, run_session
from ray_nascomp.errors import NonFiniteModelError
from ray_nascomp.nni_adapter.quantization import ActivationScale, LayerScales

INPUTS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_equals_the_model_at_any_batch_size(kind):
    network = with_large_weights(NETWORKS[kind]())
    proto = export_onnx(network, INPUTS[:2], ("x",))
    before = make_session(proto.SerializeToString())
    after = make_session(compact(proto))
    for size in (1, 2, 6):
        with torch.no_grad():
            expected = network(INPUTS[:size]).numpy()
        for session in (before, after):
            assert np.abs(run_session(session, INPUTS[:size], ("x",)) - expected).max() < 1e-4


def test_a_compact_file_keeps_the_weights_names_and_drops_the_rest():
    proto = export_onnx(NETWORKS["residual"](), INPUTS[:2], ("x",))
    size = proto.ByteSize()
    content = compact(proto)
    graph = onnx.load_from_string(content).graph
    assert len(content) < size
    assert not any(node.name or node.doc_string for node in graph.node)
    assert "model.head.weight" in {initializer.name for initializer in graph.initializer}
    assert [value.name for value in graph.input] == ["x"]


def test_only_convolutions_without_a_quantized_follower_need_a_quantized_output():
    network = with_large_weights(NETWORKS["residual"]())
    fold_batch_norm(network, INPUTS)
    proto = export_onnx(network, INPUTS[:2], ("x",))
    layers = [layer.name for layer in nc.ModelSpec.from_model(network, INPUTS[:2]).compressible_layers]
    weights = {name: network.get_submodule(name).weight.detach().numpy() for name in layers}
    # The stem's ReLU feeds an addition as well, second feeds one, expand's an average; first and depthwise feed layers.
    expected = {"stem.0": "positive", "second.0": "plain", "expand.0": "positive"}
    assert unfollowed_convolutions(proto, weights, layers) == expected
    assert "depthwise.0" in unfollowed_convolutions(proto, weights, set(layers) - {"expand.0"})


def test_integers_are_the_rounded_weights_and_run_as_simulated_by_hand():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()
    weight = network[1].weight.detach().numpy()
    scales = (np.abs(weight).max(1) / 63).astype(np.float32)
    step, zero = 8 / 255, 128
    calibration = {"1": LayerScales(scales, ActivationScale(step, zero), None)}
    proto = insert_quantization(export_onnx(network, INPUTS[:2], ("x",)), {"1": weight}, calibration)
    stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    integers = np.round(weight / scales[:, None])
    assert stored["1.weight_q"].dtype == np.int8
    assert np.array_equal(np.sort(stored["1.weight_q"].ravel()), np.sort(integers.ravel()))
    flat = INPUTS.flatten(1).numpy()
    rounded = (np.clip(np.round(flat / step) + zero, 0, 255) - zero) * step
    expected = rounded @ (integers * scales[:, None]).T + network[1].bias.detach().numpy()
    found = run_session(make_session(proto.SerializeToString()), INPUTS, ("x",))
    assert np.abs(found - expected).max() < 1e-4


def test_a_bias_fits_beside_weights_and_inputs_that_are_zero():
    # Such layers have the least scales that there are; 32 bits hold biases of up to 3e-5 at their product.
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
    weights, calibration = {}, {}
    for name in ("0", "2"):
        network[int(name)].weight.data.zero_()
        weights[name] = network[int(name)].weight.detach().numpy()
        tiny = np.full(len(weights[name]), 1.2e-7, np.float32)
        calibration[name] = LayerScales(tiny, ActivationScale(1.2e-7, 0), ActivationScale(0.01, 128))
    proto = insert_quantization(export_onnx(network, INPUTS[:2], ("x",)), weights, calibration)
    found = run_session(make_session(proto.SerializeToString()), INPUTS, ("x",))
    assert np.abs(found - network[2].bias.detach().numpy()).max() < 0.01


def test_names_are_as_long_whatever_their_number():
    names = [_short_name(number) for number in range(3224)]
    assert {len(name) for name in names} == {2}
    assert len(_short_name(3224)) == 3
    assert len({*names, *map(_short_name, range(3224, 5000))}) == 5000


def test_a_layer_that_is_not_in_the_graph_is_named():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()
    calibration = {"elsewhere": LayerScales(np.ones(5, np.float32), ActivationScale(1.0, 0), None)}
    with pytest.raises(ValueError, match="elsewhere"):
        insert_quantization(
            export_onnx(network, INPUTS[:2], ("x",)), {"elsewhere": np.ones((5, 3), np.float32)}, calibration
        )


def test_models_that_cannot_be_exported_say_why():
    class DataDependent(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) * float(len(x))

    with pytest.raises(ExportError, match="batch size"):
        export_onnx(DataDependent(), INPUTS[:2], ("x",))
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    broken[1].bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteModelError):
        export_onnx(broken, INPUTS[:2], ("x",))


def test_attempts_that_fail_print_nothing(capfd):
    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x.flatten(1))

    with pytest.raises(ExportError, match="bessel_j0"):
        export_onnx(Bessel(), INPUTS[:2], ("x",))
    printed = capfd.readouterr()
    assert "graph(" not in printed.out + printed.err


def test_latency_is_a_ratio_of_two_medians_taken_in_turn():
    content = compact(export_onnx(NETWORKS["plain"](), INPUTS[:2], ("x",)))
    latency = compare_latency(make_session(content), make_session(content), INPUTS[:1], ("x",), rounds=9)
    assert latency.original_ms > 0
    assert latency.compressed_ms > 0
    assert latency.spread >= 0
    assert latency.speedup == pytest.approx(latency.original_ms / latency.compressed_ms, rel=1.0)
