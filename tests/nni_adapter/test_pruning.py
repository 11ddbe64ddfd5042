from __future__ import annotations

import copy
import itertools

import pytest
import torch
from nni.compression import pruning
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp import pruners
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.compression.graph import remove_channels
from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import GroupSpec
from ray_nascomp.nni_adapter.evaluator import make_evaluator, train_on
from ray_nascomp.nni_adapter.pruning import channels_to_remove, weight_masks
from ray_nascomp.nni_adapter.scheduled import scheduled_pruning, scheduled_weight_masks

STEPS = 60
"""Steps of a whole training."""

GROWING = 40
"""Steps over which sparsity grows."""


def half_of(task: nc.Task) -> dict[str, tuple[GroupSpec, int]]:
    return {group.name: (group, group.width // 2) for group in task.spec.prunable_groups}


def train(task: nc.Task):
    return train_on(itertools.islice(itertools.chain(*map(task.train_batches, range(4))), STEPS))


@pytest.fixture(scope="module")
def chosen(digits_task) -> dict[str, dict[str, list[int]]]:
    return {
        method: channels_to_remove(digits_task.model, digits_task, method, half_of(digits_task), 0)
        for method in pruners.CHANNEL_METHODS
    }


@pytest.mark.parametrize(("method", "norm"), [("l1_norm", pruning.L1NormPruner), ("l2_norm", pruning.L2NormPruner)])
def test_removed_channels_are_those_of_nnis_own_mask(digits_task, chosen, method, norm):
    groups = half_of(digits_task)
    config = [
        {
            "op_names": list(group.layers),
            "sparse_ratio": 0.5,
            "dependency_group_id": name,
            "target_names": ["weight"],
        }
        for name, (group, _) in groups.items()
    ]
    _, masks = norm(copy.deepcopy(digits_task.model), config).compress()
    for name, (group, _) in groups.items():
        for layer in group.layers:
            rows = masks[layer]["weight"].flatten(1).sum(1)
            assert (rows == 0).nonzero().flatten().tolist() == chosen[method][name]


def test_slim_chooses_by_factors_on_the_batch_normalisations(digits_task, chosen):
    model, groups = copy.deepcopy(digits_task.model), half_of(digits_task)
    norms = {name: pruners.norms_of(digits_task.spec, name) for name in groups}
    assert norms["stem.0"] == ("stem.1", "second.1", "depthwise.1")
    config = [
        {"op_names": [norm], "sparse_ratio": 0.5, "dependency_group_id": name, "target_names": ["weight"]}
        for name in groups
        for norm in norms[name]
    ]
    batches = itertools.chain(digits_task.train_batches(0), digits_task.train_batches(1))
    evaluator = make_evaluator(model, digits_task, train_on(itertools.islice(batches, 32)))
    _, masks = pruning.SlimPruner(model, config, evaluator, training_steps=32, regular_scale=0.1).compress()
    for name in groups:
        assert (masks[norms[name][0]]["weight"] == 0).nonzero().flatten().tolist() == chosen["slim"][name]


@pytest.mark.parametrize("method", ["taylor", "slim", "movement"])
def test_methods_that_look_at_data_choose_other_channels_than_l1(chosen, method):
    assert chosen[method] != chosen["l1_norm"]


@pytest.mark.parametrize("method", pruners.CHANNEL_METHODS)
def test_the_count_is_exact_and_the_model_untouched(digits_task, method):
    before = {name: value.clone() for name, value in digits_task.model.state_dict().items()}
    state = torch.get_rng_state()
    counts = {name: (group, 7) for name, (group, _) in half_of(digits_task).items()}
    removed = channels_to_remove(digits_task.model, digits_task, method, counts, 3)
    assert all(len(set(indices)) == 7 for indices in removed.values())
    assert removed == channels_to_remove(digits_task.model, digits_task, method, counts, 3)
    assert all(torch.equal(value, before[name]) for name, value in digits_task.model.state_dict().items())
    assert not any(hasattr(module, "_nni_wrapper") for module in digits_task.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Heads(nn.Module):
    """Attention of four heads of three channels, over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        parts = [layer(x).unflatten(-1, (4, 3)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).mean(1))


HEADS = GroupSpec("attention", 4, ("query", "key", "value"), True, unit=3, columns_of="out")


@pytest.mark.parametrize("method", pruners.CHANNEL_METHODS)
def test_heads_are_chosen_by_the_columns_of_their_output_projection(digits, method):
    torch.manual_seed(0)
    model = Heads()
    with torch.no_grad():
        model.out.weight.view(8, 4, 3)[:, [0, 2]] *= 1e-3
        model.out.weight[0, 1] = 1e-9  # Single small columns do not count.
    task = nc.Task(model, digits["train"], digits["val"])
    out = GroupSpec("out", 8, ("out",), True)
    removed = channels_to_remove(model, task, method, {"attention": (HEADS, 2), "out": (out, 3)}, 0)
    assert len(removed["attention"]) == 2
    assert len(removed["out"]) == 3
    if method in ("l1_norm", "l2_norm", "taylor"):
        assert removed["attention"] == [0, 2]


@pytest.mark.parametrize("method", ["l1_norm", "slim", "movement"])
def test_heads_and_the_channels_behind_them_follow_one_schedule(digits, method):
    torch.manual_seed(0)
    model = Heads()
    with torch.no_grad():
        for layer in (model.query, model.key, model.value):
            layer.weight.view(4, 3, 8)[[1, 3]] *= 1e-3
    task = nc.Task(model, digits["train"], digits["val"])
    groups = {"attention": (HEADS, 2), "out": (GroupSpec("out", 8, ("out",), True), 3)}
    optimizer = (torch.optim.SGD, {"lr": 1e-3})
    masked = []

    def train_and_look(network, optimizer, step):
        train(task)(network, optimizer, step)
        masked.append(task.predict(network)(task.example_inputs))

    removed, state = scheduled_pruning(model, task, method, "agp", groups, train_and_look, GROWING, optimizer)
    assert {name: len(units) for name, units in removed.items()} == {"attention": 2, "out": 3}
    if method == "l1_norm":
        assert removed["attention"] == [1, 3]
    network = copy.deepcopy(model)
    network.load_state_dict(state)
    with torch.no_grad():
        network.out.weight.view(8, 4, 3)[:, removed["attention"]] = 0
        network.head.weight[:, removed["out"]] = 0
    assert (task.predict(network)(task.example_inputs) - masked[0]).abs().max() < 1e-5


def test_an_error_in_a_pruner_surfaces(digits_task, monkeypatch):
    def fail(_pruner):
        raise RuntimeError("planted")

    monkeypatch.setattr(pruning.L1NormPruner, "generate_masks", fail)
    with pytest.raises(RuntimeError, match="planted"):
        channels_to_remove(digits_task.model, digits_task, "l1_norm", half_of(digits_task), 0)


def test_two_of_four_keeps_the_larger_half_of_every_four_inputs(digits_task):
    weight = digits_task.model.head.weight
    mask = weight_masks(digits_task.model, digits_task, {"head": 0.3}, "2:4")["head"]
    blocks = weight.abs().reshape(-1, 4)
    assert torch.equal(mask.reshape(-1, 4), (blocks >= blocks.topk(2).values[:, 1:]).float())


def test_two_of_four_refuses_convolutions(digits_task):
    with pytest.raises(ConfigError, match="a linear layer whose inputs are a multiple of 4"):
        weight_masks(digits_task.model, digits_task, {"first.0": 0.5}, "2:4")


def test_movement_of_single_weights_differs_from_their_size(digits_task):
    level, movement = (
        weight_masks(digits_task.model, digits_task, {"first.0": 0.8}, method)["first.0"]
        for method in ("level", "movement_level")
    )
    assert movement.mean().item() == pytest.approx(0.2, abs=1e-3)
    assert 0 < (level != movement).float().mean() < 0.4


@pytest.mark.parametrize(
    ("method", "schedule"), [("l1_norm", "linear"), ("taylor", "agp"), ("slim", "agp"), ("movement", "agp")]
)
def test_a_schedule_leaves_a_network_that_does_not_need_what_it_loses(digits_task, method, schedule):
    task, groups = digits_task, half_of(digits_task)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    one_shot = copy.deepcopy(task.model)
    remove_channels(one_shot, task.example_inputs, channels_to_remove(one_shot, task, method, groups, 0))
    optimizer = (torch.optim.AdamW, {"lr": 3e-3})
    inputs = task.val_data.head(200)[0]
    masked = []

    def train_and_look(model, optimizer, step):
        train(task)(model, optimizer, step)
        masked.append(task.predict(model)(inputs))

    removed, state = scheduled_pruning(task.model, task, method, schedule, groups, train_and_look, GROWING, optimizer)
    network = copy.deepcopy(task.model)
    network.load_state_dict(state)
    remove_channels(network, task.example_inputs, removed)
    assert {name: len(indices) for name, indices in removed.items()} == {name: n for name, (_, n) in groups.items()}
    assert (task.predict(network)(inputs) - masked[0]).abs().max() < 1e-4
    for candidate in (one_shot, network):
        reestimate_batch_norm(candidate, task.calibration_batches())
    assert task.evaluate(task.predict(network)) > task.evaluate(task.predict(one_shot)) + 0.1
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_sparsity_of_single_weights_grows_by_the_cubic_schedule(digits_task):
    shares = []

    def watch(model, optimizer, step):
        for batch in itertools.islice(digits_task.train_batches(0), 20):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            shares.append(1 - model.first[0]._nni_wrapper.weight_mask.mean().item())

    optimizer = (torch.optim.AdamW, {"lr": 1e-3})
    masks, _ = scheduled_weight_masks(
        digits_task.model, digits_task, "level", "agp", {"first.0": 0.75}, watch, 20, optimizer
    )
    assert shares[1::2] == pytest.approx([0.75 * (1 - (1 - n / 10) ** 3) for n in range(1, 11)], abs=1e-3)
    assert masks["first.0"].mean().item() == pytest.approx(0.25, abs=1e-3)


def test_movement_has_its_own_schedule(digits_task):
    settings = (torch.optim.SGD, {"lr": 0.0})
    with pytest.raises(ConfigError, match="grows as 'agp' does"):
        scheduled_pruning(
            digits_task.model, digits_task, "movement", "linear", half_of(digits_task), train(digits_task), 8, settings
        )


def test_slim_is_refused_where_a_normalisation_spans_several_groups(digits):
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))

    spec = nc.Task(Concat(), digits["train"], digits["val"]).spec
    group = spec.group_of("left")
    assert "'norm' spans the channels of several groups" in pruners.refusal("slim", spec, group)
    assert pruners.refusal("taylor", spec, group) is None
