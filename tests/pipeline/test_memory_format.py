"""Networks with convolutions train with channels last where they run so."""

import pytest
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.pipeline import candidate, memory_format, run
from ray_nascomp.pipeline.run import CompressionRun


class Net(nn.Module):
    """Two convolutions; remembers how their weights lay in memory while it trained."""

    def __init__(self, flatten=torch.flatten):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(128, 10)
        self.flatten = flatten
        self.seen = set()

    def forward(self, images):
        if self.training:
            self.seen.add(is_channels_last(self.second.weight))
        return self.head(self.flatten(self.second(self.norm(self.first(images)).relu()).relu(), 1))


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def viewed(images, _):
    return images.view(images.shape[0], -1)


def make_task(digits, network, **settings):
    return nc.Task(network, digits["train"], digits["val"], **settings)


def trained(task, config, epochs=3):
    torch.manual_seed(0)
    steps = CompressionRun(task, {"finetune": {"lr": 3e-3}, **config}, epochs)
    while not steps.is_done:
        step = steps.step()
    return steps, step.metrics


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prune": {"method": "l1_norm", "sparsity": 0.5}, "finetune": {"lr": 3e-3, "distill": {"weight": 0.5}}},
        {"prune": {"method": "level", "sparsity": 0.5, "schedule": "agp"}},
        {"prune": {"method": "taylor", "sparsity": 0.5, "schedule": "agp"}},
        {"quantize": {"method": "qat", "bits": {"*": 8}}},
        {"quantize": {"method": "lsq", "bits": {"*": 4}}},
    ],
    ids=["alone", "pruned", "masked", "scheduled", "qat", "lsq"],
)
def test_convolutions_train_with_channels_last_and_come_to_the_same(digits, monkeypatch, config):
    torch.manual_seed(0)
    task = make_task(digits, Net())
    after, metrics = trained(task, config)
    assert after.candidate.network.seen == {True}
    assert not any(is_channels_last(parameter) for parameter in after.candidate.network.parameters())
    for module in (candidate, run):
        monkeypatch.setattr(module, "is_faster_channels_last", lambda network, task: False)
    before, expected = trained(task, config)
    assert before.candidate.network.seen == {False}
    assert metrics["accuracy"] == pytest.approx(expected["accuracy"], abs=0.03)
    assert metrics["accuracy"] > 0.85


def test_networks_that_view_images_train_with_channels_first(digits):
    torch.manual_seed(0)
    after, metrics = trained(make_task(digits, Net(viewed)), {})
    assert after.candidate.network.seen == {False}
    assert metrics["accuracy"] > 0.85


def test_so_do_those_whose_loss_does(digits):
    network = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 10, 5))

    def loss(outputs, targets):
        return nn.functional.cross_entropy(viewed(outputs, 1), targets)

    assert not memory_format.is_faster_channels_last(network, make_task(digits, network, loss=loss))


def test_whether_it_is_faster_leaves_a_network_as_it_was(digits):
    network = Net().train()
    network.norm.eval()
    task = make_task(digits, Net())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert memory_format.is_faster_channels_last(network, task)
    assert torch.rand(1) == expected
    assert network.training
    assert not network.norm.training
    assert network.second.weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_networks_without_convolutions_stay_as_they_are(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert not memory_format.is_faster_channels_last(network, make_task(digits, network))
