from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from nni.compression.quantization import LsqPlusQuantizer
from torch import Tensor, nn
from torch.nn import functional

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.nni_adapter.evaluator import make_evaluator, train_on
from ray_nascomp.nni_adapter.quantization import ActivationScale, Calibration, QuantizationSession
from ray_nascomp.quantizers import QUANTIZER_BITS, refusal

ADAM = (torch.optim.AdamW, {"lr": 1e-3})
SGD = (torch.optim.SGD, {"lr": 1e-2})
CASES = [(method, bits) for method, offered in QUANTIZER_BITS.items() for bits in offered] + [
    (method, None) for method in ("ptq", "qat", "lsq", "lsq_plus", "dorefa")
]


def train(task: nc.Task, steps: int):
    return train_on(itertools.islice(itertools.chain(*map(task.train_batches, range(8))), steps))


def folded(task: nc.Task) -> nn.Module:
    network = copy.deepcopy(task.model).eval()
    fold_batch_norm(network, task.example_inputs)
    return network


def session(network, task, bits, method, steps=20, **options) -> QuantizationSession:
    outputs = {"stem.0": "plain"} if "stem.0" in bits else {}
    if method == "ptq":
        return QuantizationSession(network, task, bits, outputs, **options)
    return QuantizationSession(network, task, bits, outputs, train(task, steps), ADAM, method=method, **options)


def quantized(values: Tensor, scale: ActivationScale | None) -> Tensor:
    if scale is None:
        return values
    integers = ((values / scale.scale).round() + scale.zero_point).clamp(0, 255)
    return (integers - scale.zero_point) * scale.scale


def recomputed(layer: nn.Module, inputs: Tensor, calibration: Calibration, name: str) -> Tensor:
    scales = calibration[name]
    integers = scales.integers(layer.weight.detach().numpy())
    assert abs(integers).max() <= scales.limit
    weight = torch.from_numpy(integers * scales.weight.reshape(-1, *[1] * (integers.ndim - 1)))
    inputs = quantized(inputs, scales.input)
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight, layer.bias)
    return quantized(layer._conv_forward(inputs, weight, layer.bias), scales.output)


@pytest.mark.parametrize(("method", "bits"), CASES)
def test_the_scales_give_what_was_simulated(digits_task, method, bits):
    network = folded(digits_task)
    names = [layer.name for layer in digits_task.spec.compressible_layers]
    offered = dict(zip(names, itertools.cycle((8, 4, 3)), strict=False))
    chosen = {name: bits or offered[name] for name in names}
    under = session(network, digits_task, chosen, method)
    if method != "ptq":
        under.train_epoch()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _layer, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    digits_task.predict(network)(digits_task.val_data.head(100)[0])
    calibration = under.calibration()
    under.close()
    assert list(calibration) == names
    for name, (inputs, output) in seen.items():
        expected = recomputed(network.get_submodule(name), inputs, calibration, name)
        assert (expected - output).norm() / output.norm() < 1e-3
        assert (calibration[name].input is not None) == (chosen[name] == 8)
        assert calibration[name].bits == chosen[name]
    assert (calibration["stem.0"].output is not None) == (chosen["stem.0"] == 8)


@pytest.mark.parametrize("method", ["lsq", "lsq_plus"])
def test_learned_scales_move_and_mend_two_bits(digits_task, method):
    network = folded(digits_task)
    bits = dict.fromkeys((layer.name for layer in digits_task.spec.compressible_layers), 2)
    under = session(network, digits_task, bits, method, steps=120)
    before, value = under.calibration(), digits_task.evaluate(digits_task.predict(network))
    under.train_epoch()
    after = under.calibration()
    moves = np.concatenate([abs(after[name].weight / before[name].weight - 1) for name in bits])
    assert moves.max() > 0.01
    assert np.median(moves) < 0.2
    assert digits_task.evaluate(digits_task.predict(network)) > value + 0.3
    under.close()


def test_nnis_own_lsq_plus_loses_every_positive_weight(digits_task):
    network = folded(digits_task)
    setting = {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "default"}
    config = [{"op_names": ["head"], "target_names": ["weight"], **setting}]
    evaluator = make_evaluator(network, digits_task, train(digits_task, 10), SGD)
    quantizer = LsqPlusQuantizer(network, config, evaluator)
    quantizer.compress(None, 1)
    scales = quantizer.get_calibration_config()["head"]["weight"]
    assert scales["zero_point"].item() == pytest.approx(127, abs=0.01)
    assert scales["scale"].item() == pytest.approx(0.01, rel=1e-2)
    assert network.head.weight.max() < 1e-3


def test_a_session_goes_on_from_the_scales_of_another(digits_task):
    network = folded(digits_task)
    bits = dict.fromkeys((layer.name for layer in digits_task.spec.compressible_layers), 4)
    for method in ("qat", "lsq", "lsq_plus", "dorefa"):
        first = session(network, digits_task, bits, method)
        first.train_epoch()
        calibration, outputs = first.calibration(), digits_task.predict(network)(digits_task.example_inputs)
        first.close()
        second = session(network, digits_task, bits, method, start=calibration)
        assert (digits_task.predict(network)(digits_task.example_inputs) - outputs).abs().max() < 1e-4
        second.close()


def test_what_earlier_scales_lack_is_observed(digits_task):
    network = folded(digits_task)
    first = QuantizationSession(network, digits_task, {"head": 8}, {})
    head = first.calibration()["head"]
    first.close()
    own = replace(head, weight=head.weight * 2)
    second = session(network, digits_task, {"stem.0": 8, "head": 8}, "lsq", start={"head": own})
    calibration = second.calibration()
    second.close()
    np.testing.assert_allclose(calibration["head"].weight, own.weight)
    assert calibration["stem.0"].output is not None


@pytest.mark.parametrize("method", QUANTIZER_BITS)
def test_closing_leaves_the_weights_of_an_untrained_network(digits_task, method):
    network = folded(digits_task)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    under = session(
        network, digits_task, {"first.0": QUANTIZER_BITS[method][0], "head": 1 if method == "bnn" else 4}, method
    )
    under.close()
    after = network.state_dict()
    assert set(before) == set(after)
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())


def test_scales_of_ones_own_are_used(digits_task):
    network = folded(digits_task)
    under = session(
        network,
        digits_task,
        {"head": 4},
        "ptq",
        weight_scale=lambda weight, largest: abs(weight).max(axis=1) / largest / 2,
    )
    scale = under.calibration()["head"].weight
    under.close()
    np.testing.assert_allclose(scale, abs(network.head.weight.detach().numpy()).max(axis=1) / 14, rtol=1e-6)


class Words(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12, padding_idx=0)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_embeddings_have_integers_and_one_scale_a_row(bits, limit, method):
    torch.manual_seed(0)
    tokens = torch.randint(0, 40, (64, 6))
    data = (tokens, tokens.sum(1) % 3)
    task = nc.Task(Words(), data, data)
    network = copy.deepcopy(task.model)
    under = session(network, task, {"embedding": bits, "head": 8}, method, steps=5)
    if method == "qat":
        under.train_epoch()
        assert not torch.equal(network.embedding.weight, task.model.embedding.weight)
    simulated = network.eval().embedding(tokens)
    calibration = under.calibration()["embedding"]
    under.close()
    weight = network.embedding.weight.detach().numpy()
    integers = calibration.integers(weight)
    assert abs(integers).max(axis=1).tolist() == [0] + [limit] * 39
    expected = integers * calibration.weight[:, None]
    np.testing.assert_allclose(simulated.detach().numpy(), expected[tokens.numpy()], atol=1e-6)
    assert torch.equal(network.embedding(tokens), network.embedding.weight[tokens])


def test_a_derived_class_of_layer_is_quantized_as_its_base(digits):
    class PatientLinear(nn.Linear):
        pass

    task = nc.Task(nn.Sequential(nn.Flatten(), PatientLinear(64, 10)), digits["train"], digits["val"])
    network = copy.deepcopy(task.model)
    under = session(network, task, {"1": 8}, "ptq")
    assert under.calibration()["1"].weight.shape == (10,)
    under.close()


def test_what_is_not_offered_has_a_reason():
    for method, offered in QUANTIZER_BITS.items():
        for bits in range(1, 5):
            assert (refusal(method, bits) is None) == (bits in offered)
