from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.deployment.exporters import Exporter
from ray_nascomp.deployment.gates import product_scale
from ray_nascomp.nni_adapter.quantization import ActivationScale


class Gated(nn.Module):
    """A block with an activation whose channels are gated (squeeze and excitation), and a mean over the image."""

    def __init__(self, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation, self.gate = activation, gate
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)
        for layer in (self.wide, self.squeeze, self.excite, self.narrow):
            layer.weight.data *= 3  # Both limits of hard sigmoids are passed.

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.wide(x))
        gates = self.excite(self.activation(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = self.activation(self.narrow(x * self.gate(gates)))
        return self.head(x.mean((2, 3)))


class Relu6Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


class Relu6Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.relu6(x + 3) / 6


INPUTS = 2 * torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
GATED = {
    "silu": lambda: Gated(nn.SiLU(), nn.Sigmoid()),
    "hard": lambda: Gated(nn.Hardswish(), nn.Hardsigmoid()),
    "relu6": lambda: Gated(Relu6Swish(), Relu6Sigmoid()),
}


@pytest.fixture(scope="module", params=GATED)
def task(request) -> nc.Task:
    data = INPUTS, torch.arange(64) % 5
    return nc.Task(GATED[request.param]().eval(), data, data)


def test_sigmoids_and_their_products_compute_in_integers(task, tmp_path):
    step = nc.compress(task, {"quantize": {"method": "ptq", "bits": 8}}, epochs=0)
    assert step.metrics["export_error"] < 0.03
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(step.artifact.content, options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    # Three of the activation and the gate; its three products and the gated one; no layer is left in floating point.
    assert operators.count("QLinearSigmoid") + operators.count("Clip") == 4
    assert operators.count("QLinearMul") == 4
    assert operators.count("QLinearGlobalAveragePool") == 2
    assert operators.count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in operators
    assert not {"Conv", "Gemm", "Sigmoid", "HardSigmoid", "HardSwish", "Mul"} & set(operators)
    (found,) = session.run(None, {session.get_inputs()[0].name: INPUTS.numpy()})
    expected = task.model(INPUTS).detach().numpy()
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [8, {"wide": 8}, {"excite": 8, "narrow": 8}, {"squeeze": 8, "head": 8}])
def test_their_bytes_are_told(task, bits):
    config = {"quantize": {"method": "ptq", "bits": bits if bits == 8 else {"*": 32, **bits}}}
    size = len(nc.compress(task, config, epochs=0).artifact.content)
    assert nc.CostModel(task)(config)["size_mb"] * 1e6 == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("scale", [ActivationScale(0.05, 100), ActivationScale(0.01, 0), ActivationScale(0.02, 255)])
def test_the_scale_of_silu_holds_all_that_it_makes(scale):
    values = (torch.arange(256) - scale.zero_point) * scale.scale
    products = nn.functional.silu(values)
    made = product_scale(scale, is_hard=False)
    rounded = ((products / made.scale).round() + made.zero_point).clamp(0, 255)
    restored = (rounded - made.zero_point) * made.scale
    torch.testing.assert_close(restored, products, rtol=0, atol=made.scale)
    assert made.scale == pytest.approx(float(products.max().clamp(min=0) - products.min()) / 255, rel=1e-5)


class Means(nn.Module):
    def __init__(self, axes: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.axes, self.keepdim = axes, keepdim
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(self.axes, keepdim=self.keepdim).flatten(1)


@pytest.mark.parametrize("name", ["torchscript", "dynamo"])
@pytest.mark.parametrize(
    ("axes", "keepdim", "pooled"),
    [((2, 3), False, True), ((-1, -2), True, True), ((1, 2), False, False), ((3,), False, False)],
)
def test_means_of_images_are_pooled(name, axes, keepdim, pooled):
    model = Means(axes, keepdim).eval()
    proto = Exporter(name).export(model, INPUTS[:2], ("x",), ({0: "batch"},))
    assert ("GlobalAveragePool" in {node.op_type for node in proto.graph.node}) == pooled
    (found,) = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": INPUTS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(INPUTS), rtol=0, atol=1e-5)


class Rectified(nn.Module):
    """ReLUs that something else than a layer reads, too: a stem before a residual block, and gated channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.excite, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 2)
        x = self.wide((x + self.inner(x)).relu()).relu()
        return self.last(x * self.excite(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))


def test_a_relu_is_a_part_of_its_convolution_whatever_reads_it(tmp_path):
    data = INPUTS, torch.arange(64) % 5
    task = nc.Task(Rectified().eval(), data, data)
    config = {"quantize": {"method": "ptq", "bits": 8}}
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["export_error"] < 0.02
    assert nc.CostModel(task)(config)["size_mb"] * 1e6 == pytest.approx(len(step.artifact.content), rel=0.015)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(step.artifact.content, options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("Relu") <= 1  # That of the sum.
    assert operators.count("MaxPool") == 1
    assert operators[operators.index("MaxPool") - 1] == "QLinearConv"
    assert {"QLinearGlobalAveragePool", "QLinearMul"} <= set(operators)
    assert "Mul" not in operators


@pytest.mark.parametrize("method", ["qat", "lsq", "lsq_plus", "dorefa"])
@pytest.mark.parametrize("kind", ["hard", "rectified"])
def test_trained_scales_are_those_of_the_file(method, kind):
    data = INPUTS, torch.arange(64) % 5
    model = GATED["hard"]() if kind == "hard" else Rectified()
    config = {"quantize": {"method": method, "bits": 8}, "finetune": {"lr": 1e-3}}
    step = nc.compress(nc.Task(model.eval(), data, data), config, epochs=2)
    assert step.metrics["export_error"] < 0.03
    operators = {node.op_type for node in onnx.load_from_string(step.artifact.content).graph.node}
    assert "HardSwish" not in operators or method == "lsq"  # Which has no zero points.


class UsedTwice(nn.Module):
    """A convolution whose output is rectified in one place, and read as it is in the other."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.stem, self.shared, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + self.activation(self.shared(x + self.shared(x)))).mean((2, 3))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish()])
def test_a_convolution_that_is_used_twice_keeps_both_signs(activation):
    data = INPUTS, torch.arange(64) % 5
    task = nc.Task(UsedTwice(activation).eval(), data, data)
    step = nc.compress(task, {"quantize": {"method": "ptq", "bits": 8}}, epochs=0)
    (found,) = ort.InferenceSession(step.artifact.content).run(None, {task.input_names[0]: INPUTS.numpy()})
    expected = task.model(INPUTS).detach().numpy()
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
