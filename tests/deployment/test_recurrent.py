from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.recurrent import lstms_with_floating_inputs, quantize_recurrent, round_recurrent
from ray_nascomp.deployment.runtime import make_session, run_session

INPUTS = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    def __init__(self, kind: str, bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(24, 32, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(64 if bidirectional else 32, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


def make(kind, bidirectional=False):
    torch.manual_seed(0)
    network = Recurrent(kind, bidirectional).eval()
    return network, export_onnx(network, INPUTS[:2], ("x",))


@pytest.mark.parametrize(
    ("kind", "bidirectional", "bits"),
    [("GRU", False, 8), ("GRU", True, 4), ("LSTM", True, 4), ("RNN", False, 2), ("GRU", False, 1)],
)
def test_stored_weights_equal_rounded_ones(kind, bidirectional, bits):
    network, proto = make(kind, bidirectional)
    rounded = copy.deepcopy(network)
    round_recurrent(rounded, {"rnn": bits})
    content = compact(quantize_recurrent(proto, network, {"rnn": bits}))
    for inputs in (INPUTS, INPUTS[:1, :11]):
        with torch.no_grad():
            expected = rounded(inputs).numpy()
        assert np.abs(run_session(make_session(content), inputs, ("x",)) - expected).max() < 1e-5
    weights = sum(parameter.numel() for name, parameter in network.rnn.named_parameters() if "weight" in name)
    rest = sum(parameter.numel() for parameter in network.parameters()) - weights
    # One scale a row for each 24 to 64 weights, and the nodes that unfold them.
    assert len(content) < weights * bits / 8 * 1.05 + weights / 24 * 4 + rest * 4 + 9000


def test_an_lstm_of_8_bits_computes_in_integers():
    network, proto = make("LSTM", True)
    found = quantize_recurrent(proto, network, {"rnn": 8})
    assert [node.op_type for node in found.graph.node].count("DynamicQuantizeLSTM") == 2
    stored = {entry.name: numpy_helper.to_array(entry) for entry in found.graph.initializer}
    node = next(node for node in found.graph.node if node.op_type == "DynamicQuantizeLSTM")
    rounded = copy.deepcopy(network)
    round_recurrent(rounded, {"rnn": 8})
    # Shape (directions, inputs, 4 x hidden); the first quarter is the input gate in torch as well.
    input_gate = (stored[node.input[1]][0] * stored[node.input[8]][0]).T[:32]
    assert np.abs(input_gate - rounded.rnn.weight_ih_l0.detach().numpy()[:32]).max() < 1e-6
    assert np.abs(stored[node.input[1]]).max() == 64
    content = compact(found)
    assert len(content) < 0.35 * len(compact(proto))
    for inputs in (INPUTS, INPUTS[:1, :11]):
        with torch.no_grad():
            expected = network(inputs).numpy()
        difference = run_session(make_session(content), inputs, ("x",)) - expected
        assert 0 < np.linalg.norm(difference) / np.linalg.norm(expected) < 0.03


def test_a_layer_that_is_not_in_the_graph_is_named():
    network, proto = make("GRU")
    network.rnn.weight_ih_l1.data.mul_(2)
    with pytest.raises(ValueError, match="rnn"):
        quantize_recurrent(proto, network, {"rnn": 8})


@pytest.mark.parametrize("bidirectional", [False, True])
def test_quiet_inputs_of_an_lstm_are_not_lost_beside_loud_ones(bidirectional):
    network, proto = make("LSTM", bidirectional)
    with torch.no_grad():
        network.rnn.weight_ih_l0.mul_(100)
    proto = export_onnx(network, INPUTS[:2], ("x",))
    inputs = INPUTS / 100
    assert lstms_with_floating_inputs(network, {"rnn": 8}, inputs) == set()
    inputs[0, 0, 0] = 1000.0
    floating = lstms_with_floating_inputs(network, {"rnn": 8}, inputs)
    assert floating == {"rnn"}
    found = quantize_recurrent(proto, network, {"rnn": 8}, floating)
    kinds = [node.op_type for node in found.graph.node]
    assert kinds.count("LSTM") == 1
    assert kinds.count("DynamicQuantizeLSTM") == 1
    content = compact(found)
    assert len(content) < 0.35 * len(compact(proto))
    in_integers = compact(quantize_recurrent(proto, network, {"rnn": 8}))
    round_recurrent(network, {"rnn": 8}, floating)
    with torch.no_grad():
        expected = network(inputs).numpy()
    error = np.linalg.norm(run_session(make_session(content), inputs, ("x",)) - expected) / np.linalg.norm(expected)
    assert error < 0.02
    lost = np.linalg.norm(run_session(make_session(in_integers), inputs, ("x",)) - expected) / np.linalg.norm(expected)
    assert lost > 5 * error


class Reader(nn.Module):
    """Only torch.export takes a pool of which one side is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((None, 1))
        self.rnn = nn.LSTM(6, 256, bidirectional=True, batch_first=True)
        self.head = nn.Linear(512, 3)

    def forward(self, x):
        return self.head(self.rnn(self.pool(x).squeeze(3))[0])


def test_large_recurrent_weights_are_found_whichever_exporter_wrote_them():
    network = Reader().eval()
    inputs = torch.randn(2, 5, 6, 3)
    proto = export_onnx(network, inputs, ("x",))
    found = quantize_recurrent(proto, network, {"rnn": 8})
    assert [node.op_type for node in found.graph.node].count("DynamicQuantizeLSTM") == 1
    with torch.no_grad():
        expected = network(inputs).numpy()
    assert np.abs(run_session(make_session(compact(found)), inputs, ("x",)) - expected).max() < 0.02
