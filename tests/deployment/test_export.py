from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.exporters import exporters_for
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.tasks.axes import resized, sequence_axes


class Tagger(nn.Module):
    """Token ids and a mask through a GRU: batch and length may change."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, input_ids, attention_mask):
        return self.head(self.rnn(self.embedding(input_ids) * attention_mask.unsqueeze(-1))[0])


class FixedLength(nn.Module):
    """A flatten ties the length to the weights; a second input has an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.head = nn.Linear(48, 4)

    def forward(self, ids, bias):
        return self.head(self.embedding(ids).flatten(1)) + bias


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def tokens(batch, length):
    ids = torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def shapes_of(proto):
    return [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in proto.graph.input
    ]


def test_token_ids_keep_batch_and_length_open():
    torch.manual_seed(0)
    network = Tagger().eval()
    proto = export_onnx(network, tokens(2, 9), ("input_ids", "attention_mask"))
    assert shapes_of(proto) == [["batch", "length"]] * 2
    session = make_session(proto.SerializeToString())
    for batch, length in ((1, 3), (5, 40)):
        inputs = tokens(batch, length)
        with torch.no_grad():
            expected = network(**inputs).numpy()
        assert np.abs(run_session(session, inputs, tuple(inputs)) - expected).max() < 1e-5


def test_a_length_that_the_model_needs_is_kept():
    torch.manual_seed(0)
    network = FixedLength().eval()
    inputs = (torch.randint(0, 30, (3, 6)), torch.randn(3, 4))
    assert sequence_axes(network, inputs) is None
    proto = export_onnx(network, inputs, ("ids", "bias"))
    assert shapes_of(proto) == [["batch", 6], ["batch", 4]]
    with torch.no_grad():
        expected = network(*inputs).numpy()
    assert np.abs(run_session(make_session(proto.SerializeToString()), inputs, ("ids", "bias")) - expected).max() < 1e-5


def test_of_floating_point_inputs_the_axis_of_time_is_found():
    network = nn.Sequential(nn.Conv1d(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    assert sequence_axes(network, torch.randn(2, 8, 20)) == ({0: "batch", 2: "length"},)
    assert sequence_axes(nn.Sequential(nn.Linear(8, 2)), torch.randn(2, 20, 8)) is None


def test_a_shorter_input_keeps_what_the_mask_leaves():
    inputs = tokens(2, 8)
    axes = ({0: "batch", 1: "length"},) * 2
    assert torch.equal(resized(inputs, axes)["input_ids"], inputs["input_ids"][:, :6])
    inputs["attention_mask"] = torch.zeros(2, 8, dtype=torch.long)
    inputs["attention_mask"][:, 6:] = 1
    assert torch.equal(resized(inputs, axes)["input_ids"], inputs["input_ids"][:, 2:])


def test_double_precision_is_cast():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double().eval()
    inputs = torch.randn(3, 3, 4, dtype=torch.float64)
    session = make_session(export_onnx(network, inputs, ("x",)).SerializeToString())
    found = run_session(session, inputs, ("x",))
    assert network[1].weight.dtype == torch.float64
    assert found.dtype == np.float32
    assert np.abs(found - network(inputs).detach().numpy()).max() < 1e-5


def test_the_exporter_follows_from_the_kind_of_model():
    convolutional = exporters_for(nn.Sequential(nn.Conv2d(1, 4, 3)), torch.randn(2, 1, 8, 8))
    assert [exporter.name for exporter in convolutional] == ["torchscript", "dynamo"]
    assert exporters_for(Tagger(), tokens(2, 5))[0].name == "torchscript"
    for network in (Encoder(), Functional()):
        first = exporters_for(network, torch.randn(2, 5, 16))[0]
        assert (first.name, first.opset) == ("dynamo", 23)


@pytest.mark.slow
def test_attention_becomes_an_operator_and_the_length_stays_open():
    torch.manual_seed(0)
    network = Encoder().eval()
    inputs = torch.randn(3, 7, 16)
    proto = export_onnx(network, inputs, ("x",))
    assert "Attention" in {node.op_type for node in proto.graph.node}
    assert shapes_of(proto) == [["batch", "length", 16]]
    longer = torch.randn(1, 30, 16)
    with torch.no_grad():
        expected = network(longer).numpy()
    assert np.abs(run_session(make_session(proto.SerializeToString()), longer, ("x",)) - expected).max() < 1e-4
