from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from candidates import candidate_of
from torch import nn

import ray_nascomp as nc
from ray_nascomp.costs.onnx_sizes import attribute, node, tensor
from ray_nascomp.pipeline.measure import file_of, simulate
from ray_nascomp.pipeline.prepare import prepare


class Everything(nn.Module):
    """A table, convolutions of one and two dimensions, a depthwise one, two layers that read one tensor, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 15)
        self.wave = nn.Conv1d(15, 18, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(18)
        self.image = nn.Conv2d(18, 21, 3, padding=1)
        self.depthwise = nn.Conv2d(21, 21, 3, padding=1, groups=21)
        self.memory = nn.LSTM(21, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.left = nn.Linear(12, 19)
        self.right = nn.Linear(12, 19)
        self.head = nn.Linear(19, 5)

    def forward(self, ids):
        features = torch.relu(self.norm(self.wave(self.table(ids).transpose(1, 2))))
        features = torch.relu(self.depthwise(torch.relu(self.image(features.unsqueeze(2))))).squeeze(2)
        sequence, _ = self.memory(features.transpose(1, 2))
        return self.head((self.left(sequence) * torch.sigmoid(self.right(sequence))).mean(1))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    data = (torch.randint(0, 40, (16, 9)), torch.arange(16) % 5)
    return nc.Task(Everything().eval(), data, data)


def exported(task, config):
    candidate = candidate_of(task, config)
    prepared = prepare(candidate, task)
    proto = prepared.export(task)
    return len(file_of(prepared, proto, simulate(prepared, task, prepared.outputs_to_quantize(proto))))


CONFIGS = {
    "thinner": {"prune": {"sparsity": 0.5}},
    "factors": {"low_rank": {"rank": 0.5}},
    "8 bits": {"quantize": {"bits": 8}},
    "4 bits": {"quantize": {"bits": 4}},
    "factors of 4 bits": {"quantize": {"bits": 4}, "low_rank": {"rank": 0.4}},
    "factors of 2 bits": {"quantize": {"method": "qat", "bits": 2}, "low_rank": {"rank": 0.7}},
    "1 bit": {"quantize": {"method": "bnn", "bits": 1}},
    "mixed": {
        "prune": {"sparsity": {"image": 0.3}},
        "low_rank": {"rank": {"head": 0.5, "table": 0.3}},
        "quantize": {"bits": {"image": 8, "depthwise": 4, "left": 8, "right": 3, "table": 8, "memory": 8}},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_as_large_as_told(task, name):
    # What depends on values are zero points that happen to be equal: 13 bytes each.
    told = nc.CostModel(task)(CONFIGS[name])["size_mb"] * 1e6
    assert told == pytest.approx(exported(task, CONFIGS[name]), abs=60)


def test_what_transformers_share_is_counted_once():
    families = pytest.importorskip("transformer_families")
    model, inputs = families.make("bert", "sdpa", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    inputs = {name: value.repeat(8, 1) for name, value in inputs.items()}
    own = nc.Task(model, (inputs, torch.arange(16) % 3), (inputs, torch.arange(16) % 3))
    attention = "bert.encoder.layer.0.attention.self"
    # Queries and keys read one smoothed tensor, values the same one as it is; one table is a product.
    config = {
        "prune": {"sparsity": {attention: 0.5}},
        "low_rank": {"rank": {f"{attention}.query": 0.5, "bert.embeddings.word_embeddings": 0.4}},
        "quantize": {"bits": {"*": 8, f"{attention}.value": 32, "bert.encoder.layer.0.output.dense": 4}},
    }
    told = nc.CostModel(own)(config)["size_mb"] * 1e6
    assert told == pytest.approx(exported(own, config), rel=0.01)


@pytest.mark.parametrize("bits", [3, 4])
def test_products_in_blocks_are_as_large_as_told_and_do_what_the_rounded_weights_do(bits):
    torch.manual_seed(0)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # 128 and 250 inputs fill blocks of 128, 160 those of 32; 200 waste too much of any; 40 are too few.
            self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in ((128, 250), (250, 200), (200, 40), (40, 9))])

        def forward(self, tokens):
            for layer in self.layers:
                tokens = torch.relu(layer(tokens))
            return tokens.mean(1)

    data = (torch.randn(16, 6, 128), torch.arange(16) % 5)
    own = nc.Task(Mixer().eval(), data, data)
    for config in ({"quantize": {"bits": bits}}, {"quantize": {"bits": bits}, "prune": {"sparsity": 0.2}}):
        step = nc.compress(own, config, epochs=0)
        operators = [node.op_type for node in onnx.load_from_string(step.artifact.content).graph.node]
        assert operators.count("MatMulNBits") == 2
        assert step.metrics["export_error"] < 0.02
        told = nc.CostModel(own)(config)["size_mb"] * 1e6
        assert told == pytest.approx(len(step.artifact.content), abs=60)


def test_nodes_and_tensors_are_counted_to_the_byte():
    from onnx import GraphProto, helper, numpy_helper

    graph = GraphProto()
    for shape, letters in (((3,), 2), ((130, 7), 40), ((20000,), 2), ((5, 4, 3, 3), 130)):
        size = graph.ByteSize()
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "n" * letters))
        assert graph.ByteSize() - size == tensor(letters, shape, 4 * int(np.prod(shape)))
    size = graph.ByteSize()
    graph.node.append(helper.make_node("Concat", ["ab", "c" * 140], ["de"], axis=-1, direction="RIGHT", pads=[0, 300]))
    attributes = attribute("axis", -1) + attribute("direction", "RIGHT") + attribute("pads", [0, 300])
    assert graph.ByteSize() - size == node("Concat", [2, 140, 2], attributes)
