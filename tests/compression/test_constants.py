from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.constants import layers_of_constants


class Table(nn.Module):
    """Adds to each place what a layer makes of a table."""

    def __init__(self, length: int, features: int = 16) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, features, generator=torch.Generator().manual_seed(0)))
        self.of_table = nn.Linear(features, 2 * features)
        self.of_input = nn.Linear(8, 2 * features)
        self.head = nn.Linear(2 * features, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head((self.of_input(inputs) + self.of_table(self.table)).relu().mean(1))


class Tokens(nn.Module):
    """Sentences of any length; the table is for the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.places = nn.Embedding(40, 16)
        self.of_places = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.of_places(self.places(torch.arange(ids.shape[1])))
        return self.head((self.words(ids) + places).relu().mean(1))


def test_layers_that_read_a_table_are_told_from_those_that_read_the_input() -> None:
    assert layers_of_constants(Table(6).eval(), torch.randn(2, 6, 8)) == {"of_table"}
    # Of another length it would be another table: files with a free length compute it.
    assert layers_of_constants(Tokens().eval(), torch.randint(0, 50, (2, 12))) == set()


def test_experts_for_some_samples_alone_do_not_read_constants() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 2) for _ in range(3)])

        def forward(self, inputs: Tensor) -> Tensor:
            chosen = (inputs[:, 0] > 0).long()
            outputs = torch.zeros(len(inputs), 2)
            for number, expert in enumerate(self.experts):
                outputs[chosen == number] = expert(inputs[chosen == number])
            return outputs

    inputs = torch.ones(2, 8)
    inputs[1] = -1
    assert layers_of_constants(Experts().eval(), inputs) == set()


def test_a_model_that_takes_one_number_of_samples_alone_has_none() -> None:
    class Fixed(Tokens):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.reshape(2, 12))

    assert layers_of_constants(Fixed().eval(), torch.randint(0, 50, (2, 12))) == set()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_such_layers_keep_rank_and_precision_and_the_file_is_as_foretold(sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, 8, generator=generator)
    data = inputs, (inputs.mean((1, 2)) > 0).long()
    task = nc.Task(Table(6), data, data)
    assert set(task.spec.quantizable_names) == {"of_input", "head"}
    assert "of_table" not in task.spec.factorisable_names
    (group,) = task.spec.prunable_names
    config = {
        "prune": {"sparsity": {group: sparsity}},
        "low_rank": {"rank": {"*": 0.5}},
        "quantize": {"bits": {"*": 8}},
    }
    step = nc.compress(task, config, epochs=0)
    assert step.artifact is not None
    assert step.metrics["size_mb"] == pytest.approx(nc.CostModel(task)(config)["size_mb"], rel=0.1)
    with pytest.raises(nc.ConfigError, match="of_table"):
        nc.compress(task, {"quantize": {"bits": {"of_table": 8}}}, epochs=0)
