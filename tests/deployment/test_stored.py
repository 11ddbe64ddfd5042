from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.deployment.stored import NodeList, pack, stored_bits, unfold
from ray_nascomp.errors import ConfigError
from ray_nascomp.nni_adapter.quantization import ActivationScale, LayerScales


def test_bits_between_the_packed_forms_take_the_next_larger_one():
    assert [stored_bits("linear", bits) for bits in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert stored_bits("embedding", 32) == 32
    with pytest.raises(ConfigError, match="0"):
        stored_bits("conv", 0)
    with pytest.raises(ConfigError, match="pooling"):
        stored_bits("pooling", 8)


def test_the_first_part_of_a_row_lies_in_the_lowest_bits():
    assert pack(np.array([1, 2, 3, 4, 5]), 4).tolist() == [1 | 4 << 4, 2 | 5 << 4, 3]
    assert pack(np.array([[1, 0, 1, 1, 0, 0, 0, 1]]), 1).tolist() == [[0b10001101]]
    # Nine ones make eight planes of two.
    assert pack(np.ones((1, 9), int), 1).tolist() == [[0b00011111, 0b00001111]]


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(1, 8),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    data_type=st.sampled_from([TensorProto.FLOAT, TensorProto.INT8]),
    seed=st.integers(0, 2**16),
)
def test_what_is_stored_is_what_is_unfolded(bits, shape, data_type, seed):
    limit = max(1, 2 ** (bits - 1) - 1)
    integers = np.random.default_rng(seed).integers(-limit, limit + 1, shape).astype(np.int8)
    if bits == 1:
        integers = np.where(integers > 0, 1, -1).astype(np.int8)
    target = NodeList("w", "v")
    name = target.node("Identity", [unfold(target, integers, bits, data_type)])
    output = helper.make_tensor_value_info(name, data_type, shape)
    graph = helper.make_graph(target.nodes, "g", [], [output], target.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[0]
    assert np.array_equal(found, integers)
    stored = next(constant for constant in target.constants if constant.name == "w_q")
    size = stored_bits("linear", bits)
    rows = shape[0] if len(shape) == 2 else 1
    assert len(stored.raw_data) == rows * -(-integers.size // rows * size // 8)


class Mixed(nn.Module):
    """An embedding, a convolution, and linear layers that export as MatMul and as Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 27)
        self.conv = nn.Conv1d(27, 24, 3, padding=1)
        self.tokens = nn.Linear(24, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, ids):
        features = torch.relu(self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(torch.relu(self.tokens(features)).mean(1))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    network = Mixed().eval()
    ids = torch.randint(0, 50, (4, 12))
    return network, ids, export_onnx(network, ids[:2], ("ids",))


def scales_of(weight, bits):
    flat = np.abs(weight).reshape(len(weight), -1)
    unit = flat.mean(1) if bits == 1 else flat.max(1) / (2 ** (bits - 1) - 1)
    return LayerScales(unit.astype(np.float32), None, None, bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_weights_alone_in_integers_equal_rounded_weights_and_take_their_bits(mixed, bits):
    network, ids, proto = mixed
    weights = {name: network.get_submodule(name).weight.detach().numpy() for name, _ in network.named_children()}
    calibration = {name: scales_of(weight, bits) for name, weight in weights.items()}
    rounded = Mixed().eval()
    rounded.load_state_dict(network.state_dict())
    for name, scales in calibration.items():
        shape = (-1,) + (1,) * (weights[name].ndim - 1)
        values = scales.integers(weights[name]) * scales.weight.reshape(shape)
        rounded.get_submodule(name).weight.data.copy_(torch.from_numpy(values))
    found = insert_quantization(proto, weights, calibration)
    with torch.no_grad():
        expected = rounded(ids).numpy()
    content = compact(found)
    assert np.abs(run_session(make_session(content), ids, ("ids",)) - expected).max() < 1e-5
    stored = [entry for entry in onnx.load_from_string(content).graph.initializer if entry.name.endswith("_q")]
    assert len(stored) == 4
    size = sum(len(entry.raw_data) for entry in stored)
    total = sum(weight.size for weight in weights.values())
    # Rows end at bytes.
    assert total * stored_bits("linear", bits) / 8 <= size <= 1.1 * total * stored_bits("linear", bits) / 8


def test_constants_are_unfolded_once_when_the_file_is_loaded(mixed, tmp_path):
    network, _ids, proto = mixed
    names = ("conv", "tokens", "head")
    weights = {name: network.get_submodule(name).weight.detach().numpy() for name in names}
    found = insert_quantization(proto, weights, {name: scales_of(weights[name], 4) for name in names})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"BitwiseAnd", "BitShift", "Cast", "Sub", "Mul"}


def test_few_bits_and_integer_inputs_run_in_integer_kernels(mixed, tmp_path):
    network, ids, proto = mixed
    weights = {"tokens": network.tokens.weight.detach().numpy()}
    scales = scales_of(weights["tokens"], 4)
    calibration = {"tokens": LayerScales(scales.weight, ActivationScale(0.01, 0), None, 4)}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    found = insert_quantization(proto, weights, calibration)
    session = onnxruntime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "MatMulIntegerToFloat" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    with torch.no_grad():
        features = torch.relu(network.conv(network.embedding(ids).transpose(1, 2)).transpose(1, 2))
        inputs = (features / 0.01).round().clamp(0, 255) * 0.01
        weight = torch.from_numpy(scales.integers(weights["tokens"]) * scales.weight[:, None])
        hidden = torch.relu(inputs @ weight.T + network.tokens.bias)
        expected = network.head(hidden.mean(1)).numpy()
    assert np.abs(run_session(session, ids, ("ids",)) - expected).max() < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_convolutions_of_few_bits_run_in_integer_kernels(mixed, tmp_path, bits):
    network, ids, proto = mixed
    weights = {"conv": network.conv.weight.detach().numpy()}
    scales = scales_of(weights["conv"], bits)
    inputs, outputs = ActivationScale(0.03, 128), ActivationScale(0.05, 120)
    found = insert_quantization(proto, weights, {"conv": LayerScales(scales.weight, inputs, outputs, bits)})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "QLinearConv" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    weight = torch.from_numpy(scales.integers(weights["conv"]) * scales.weight[:, None, None])
    with torch.no_grad():
        rows = network.embedding(ids).transpose(1, 2)
        rows = ((rows / 0.03).round() + 128).clamp(0, 255).sub(128) * 0.03
        features = torch.conv1d(rows, weight, network.conv.bias, padding=1)
        features = ((features / 0.05).round() + 120).clamp(0, 255).sub(120) * 0.05
        hidden = network.tokens(torch.relu(features).transpose(1, 2))
        expected = network.head(torch.relu(hidden).mean(1)).numpy()
    # A value between two steps may fall to either.
    assert np.abs(run_session(session, ids, ("ids",)) - expected).max() < 0.02 * np.abs(expected).max()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.middle(self.embedding(ids))))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_and_the_head_that_is_tied_to_it_are_stored_once(bits):
    torch.manual_seed(0)
    network = Tied().eval()
    ids = torch.randint(0, 64, (3, 6))
    weight = network.embedding.weight.detach().numpy()
    # Products of 8 bits keep to 7.
    scales = LayerScales(np.abs(weight).max(1) / (63 if bits == 8 else 7), None, None, bits)
    head = LayerScales(scales.weight, ActivationScale(2 / 255, 128), None, bits)
    proto = export_onnx(network, ids[:2], ("ids",))
    # In floating point it is stored once as well; the head's is a transposition of it.
    assert sum(entry.dims[0] * entry.dims[1] == 1024 for entry in proto.graph.initializer if len(entry.dims) == 2) == 1
    for head_scales in (scales, head):
        found = insert_quantization(
            proto, {"embedding": weight, "head": weight}, {"embedding": scales, "head": head_scales}
        )
        names = [entry.name for entry in found.graph.initializer if entry.name.endswith("_q")]
        assert names == ["embedding.weight_q"]
        rounded = torch.from_numpy(scales.integers(weight) * scales.weight[:, None])
        with torch.no_grad():
            hidden = torch.tanh(network.middle(rounded[ids]))
            if head_scales is head:
                hidden = ((hidden / (2 / 255)).round() + 128).clamp(0, 255).sub(128) * (2 / 255)
            expected = (hidden @ rounded.T).numpy()
        assert np.abs(run_session(make_session(compact(found)), ids, ("ids",)) - expected).max() < 1e-4
