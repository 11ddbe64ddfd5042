"""What tests share: one Ray instance, and a small trained network on real scans of digits."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.path.dirname(__file__)  # Ray's workers import the tests' networks.

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ray_nascomp import Task


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How pytest-xdist spreads the tests over processes."""
    from one_ray import OneRay

    return OneRay(config, log)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray instance with two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits() -> dict[str, Any]:
    """scikit-learn's handwritten digits: train, val and test pairs of tensors."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    rest, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=0.2, random_state=0, stratify=labels[rest])
    return {name: (inputs[rows], targets[rows]) for name, rows in (("train", train), ("val", val), ("test", test))}


@pytest.fixture(scope="session")
def digits_task(digits: dict[str, Any]) -> Task:
    """A residual network with a depthwise convolution, trained on the digits for some seconds."""
    import torch
    from networks import ResidualNet

    import ray_nascomp as nc

    # Two threads wait for each other on a busy machine: there the tests took over ten times as long.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = ResidualNet()
    inputs, targets = digits["train"]
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    network.train()
    for epoch in range(6):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    network.eval()
    return nc.Task(network, digits["train"], digits["val"], test_data=digits["test"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same, whichever ran before it; Tune samples from NumPy's global generator."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    """What a test registers is gone after it."""
    from ray_nascomp import registry

    before = registry.snapshot()
    yield
    registry._registered.update(before)
