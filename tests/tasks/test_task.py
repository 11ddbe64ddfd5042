from __future__ import annotations

import cloudpickle
import numpy as np
import pytest
import torch
from networks import PlainNet
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.transport import Packed, pack, unpack

X, Y = torch.randn(40, 1, 8, 8), torch.arange(40) % 10


class Augmented(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": X[index], "labels": Y[index]}


@pytest.mark.parametrize(
    "data",
    [(X, Y), TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=7), Augmented(), [(X[0], 1), (X[1], 2)]],
)
def test_data_comes_in_many_forms(data):
    task = nc.Task(PlainNet(), data, data, batch_size=8)
    inputs, targets = next(task.train_batches(0))
    assert len(targets) == min(8, len(task.train_data))
    assert 0 <= task.evaluate(task.predict(task.model)) <= 1
    assert set(task.input_names) == {"x"}
    assert isinstance(inputs, (torch.Tensor, dict))


def test_the_metric_is_over_all_samples_and_takes_any_function():
    def error_rate(outputs, targets):
        return (outputs.argmax(1) != targets).float().mean().item()

    task = nc.Task(PlainNet(), (X, Y), (X, Y), metric=error_rate, mode="min")
    accuracy = nc.Task(task.model, (X, Y), (X, Y))
    predict = task.predict(task.model)
    assert task.metric == "error_rate"
    assert task.evaluate(predict) == pytest.approx(1 - accuracy.evaluate(predict))
    assert task.drop(0.3, 0.1) == pytest.approx(0.2)
    assert accuracy.drop(0.3, 0.1) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"val_data": (X[:0], Y[:0])}, "val_data: it is empty"),
        ({"train_data": 5}, "train_data: int was given"),
        ({"metric": "f1"}, "metric: 'f1'"),
        ({"mode": "up"}, "'up'"),
        ({"build": lambda architecture: PlainNet()}, "builder and its dimensions"),
        ({"batch_size": 0}, "batch_size"),
        ({"model": "resnet"}, "model: a str"),
        ({"val_data": ({"y": X}, Y)}, "train_data: the inputs input_0 were given; allowed: y, as in val_data"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(ConfigError, match=says):
        nc.Task(**{"model": PlainNet(), "train_data": (X, Y), "val_data": (X, Y), **arguments})


def test_samples_of_class_minus_100_have_no_label():
    def smoothed(outputs, targets):  # It knows of no such class.
        return torch.nn.functional.nll_loss(outputs.log_softmax(-1), targets, ignore_index=-1)

    task = nc.Task(PlainNet(), (X, Y), (X, Y), loss=smoothed)
    outputs = torch.randn(4, 10, requires_grad=True)
    some, none = torch.tensor([3, -100, 7, -100]), torch.full((4,), -100)
    assert task.loss(outputs, some) == smoothed(outputs[[0, 2]], some[[0, 2]])
    task.loss(outputs, none).backward()
    assert outputs.grad.count_nonzero() == 0
    with pytest.raises(ConfigError, match="2 of 4 samples that are to be judged have no label"):
        task.score(outputs.detach(), some)
    assert nc.Task(PlainNet(), (X, Y), (X, Y), loss=torch.sub).loss(torch.zeros(1), torch.tensor([-100.0])) == 100


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (Y.float(), "targets of torch.float32 were given; allowed: classes of torch.int64, or a loss"),
        (Y.int(), "targets of torch.int32 were given"),
        (Y - 1, "class -1 was given; allowed: 0 and up, and -100"),
    ],
)
def test_targets_that_are_no_classes_are_refused_before_any_work(targets, says):
    with pytest.raises(ConfigError, match=f"train_data: {says}"):
        nc.Task(PlainNet(), (X, targets), (X, Y))
    with pytest.raises(ConfigError, match=f"val_data: {says}"):
        nc.Task(PlainNet(), (X, Y), (X, Y)).with_changes(val_data=(X, targets))


def test_a_class_that_the_model_does_not_know_is_refused_before_any_work():
    beyond = Y.clone()
    beyond[3] = 12
    for parts, name in ((((X, beyond), (X, Y)), "train_data"), (((X, Y), (X, beyond)), "val_data")):
        task = nc.Task(PlainNet(), *parts)
        says = f"{name}: class 12 was given; allowed: 0 to 9, what the model tells apart"
        with pytest.raises(ConfigError, match=says):
            nc.compression_space(task)
        with pytest.raises(ConfigError, match=says):
            nc.compress(task, {})
        with pytest.raises(ConfigError, match=says):
            nc.compression_trainable(task, nc.Goal([nc.Objective("accuracy")]))


def test_inputs_by_name_come_in_any_order():
    class Difference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, one, other):
            return self.layer(one - 2 * other)

    one, other, targets = torch.randn(20, 6), torch.randn(20, 6), torch.arange(20) % 3
    network = Difference()
    with torch.no_grad():
        targets = network(one, other).argmax(1)
    task = nc.Task(network, ({"one": one, "other": other}, targets), ({"other": other, "one": one}, targets))
    step = nc.compress(task, {}, epochs=0)
    assert step.metrics["accuracy"] == 1.0
    assert step.metrics["divergence"] < 1e-9


def test_calibration_comes_from_training_data_and_never_from_validation():
    task = nc.Task(PlainNet(), (torch.ones(40, 1, 8, 8), Y), (torch.zeros(40, 1, 8, 8), Y))
    assert all((inputs == 1).all() for inputs, _ in task.calibration_batches())
    task = nc.Task(PlainNet(), (X, Y), (X, Y), calibration_data=(torch.full((4, 1, 8, 8), 2.0), Y[:4]))
    assert all((inputs == 2).all() for inputs, _ in task.calibration_batches())


def test_workers_do_not_get_the_test_set_and_share_memory():
    task = nc.Task(PlainNet(), (X, Y), (X, Y), test_data=(X, Y))
    packed = pack(task)
    copy = unpack(Packed(packed.skeleton, packed.arrays))
    assert copy.test_data is None
    assert copy.fingerprint == task.fingerprint
    weight, original = copy.model.hidden.weight, task.model.hidden.weight
    assert weight.data_ptr() == original.data_ptr()
    assert len(packed.skeleton) < 30_000
    assert copy.train_data.head(2)[0].data_ptr() != 0


def test_packing_keeps_ties_types_and_gradients():
    a = torch.nn.Parameter(torch.randn(3).bfloat16(), requires_grad=False)
    value = unpack(pack({"a": a, "b": a, "c": torch.arange(4)[::2], "empty": torch.zeros(0, 3)}))
    assert value["a"] is value["b"]
    assert value["a"].dtype is torch.bfloat16
    assert not value["a"].requires_grad
    assert value["c"].tolist() == [0, 2]
    assert value["empty"].shape == (0, 3)
    assert np.frombuffer(cloudpickle.dumps(pack(a)), np.uint8).size > 0


def test_weights_are_inherited_by_overlap():
    from ray import tune

    space = {"width": tune.choice([4, 8]), "depth": tune.choice([1, 2])}

    def build(architecture):
        return PlainNet((architecture["width"], 12)[: architecture["depth"]])

    task = nc.Task(PlainNet((8, 12)), (X, Y), (X, Y), build=build, architecture=space)
    network = task.network({"width": 4, "depth": 2})
    assert torch.equal(network.blocks[0][0].weight, task.model.blocks[0][0].weight[:4])
    assert torch.equal(network.blocks[1][0].weight, task.model.blocks[1][0].weight[:, :4])
    with pytest.raises(ConfigError, match="'height' is unknown"):
        task.network({"height": 4})
    with pytest.raises(ConfigError, match="no builder"):
        nc.Task(PlainNet(), (X, Y), (X, Y)).network({"width": 4})


def test_results_are_relative_to_the_original_of_a_model_that_is_smaller_already():
    wide, narrow = PlainNet((16, 24)), PlainNet((8, 12))
    data = (torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    original = nc.Task(wide, data, data)
    task = nc.Task(narrow, data, data, original=original)
    plain, relative = (nc.compress(each, {}, epochs=0).metrics for each in (original, task))
    assert relative["size_ratio"] == pytest.approx(plain["size_mb"] / relative["size_mb"])
    assert relative["params_ratio"] == pytest.approx(plain["params"] / relative["params"])
    assert relative["params_ratio"] > 2
    assert relative["accuracy_drop"] == pytest.approx(plain["accuracy"] - relative["accuracy"])
    with pytest.raises(ConfigError, match="original: its metric"):
        nc.Task(narrow, data, data, metric=lambda outputs, targets: 0.5, original=original)


def test_a_task_with_other_data_takes_them_as_a_new_task_does(digits, digits_task):
    few = (digits["train"][0][:50], digits["train"][1][:50])
    changed = digits_task.with_changes(train_data=few, batch_size=16)
    assert len(changed.train_data) == 50
    assert len(digits_task.train_data) == len(digits["train"][1])
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 10))
    changed = changed.with_changes(model=torch.nn.Sequential(torch.nn.Flatten(), normed))
    assert not any(map(torch.nn.utils.parametrize.is_parametrized, changed.model.modules()))
    with pytest.raises(ConfigError, match="val_data: str was given"):
        digits_task.with_changes(val_data="digits")
    with pytest.raises(ConfigError, match="'modle' is unknown; allowed: 'model', 'train_data'"):
        digits_task.with_changes(modle=digits_task.model)
