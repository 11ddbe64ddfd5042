"""Bytes that `CostModel` tells against those of the exported file, on networks that nothing was derived from.

    python benchmarks/cost_bytes.py --configs 200 --output benchmarks/results/cost_bytes.json

Random configs, the same in each run, mix sparsities, ranks and bits layer by layer. Each is carried out and exported by
the real pipeline, without training and without timing, on which a file's size does not depend. Files whose bytes
the output already holds are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.errors import InfeasibleError
from ray_nascomp.pipeline import CompressionRun
from ray_nascomp.pipeline.candidate import make_candidate
from ray_nascomp.pipeline.measure import file_of, simulate
from ray_nascomp.pipeline.prepare import prepare
from ray_nascomp.plan import bits_of


def _block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    """Convolutions with and without a bias, and a classifier of three linear layers."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(3, width), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            _block(2 * width, 2 * width), _block(2 * width, 3 * width),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * width * 16, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width), nn.Tanh(),
            nn.Linear(2 * width, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _block(inputs, outputs, 2)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(features)) + self.shortcut(features))


class Residual(nn.Module):
    """Three residual blocks whose shortcuts are convolutions."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = _block(3, width)
        self.stages = nn.Sequential(_Residual(width, width), _Residual(width, 2 * width), _Residual(2 * width, 48))
        self.head = nn.Linear(48, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted bottlenecks with bounded activations."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_block(3, width, 2)]
        for _ in range(depth):
            inner = 3 * width
            blocks += [nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
            blocks += [_block(inner, inner, 1, inner), nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean((2, 3)))


class Sequence(nn.Module):
    """One-dimensional convolutions, a recurrent layer, and linear layers."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int, layers: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(9, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 32, 3, 2), nn.ReLU())
        self.recurrent = kind(32, hidden, layers, batch_first=True, bidirectional=layers > 1)
        self.mix = nn.Linear(hidden * (2 if layers > 1 else 1), 40)
        self.head = nn.Linear(40, 6)

    def forward(self, signals: Tensor) -> Tensor:
        sequence, _ = self.recurrent(self.conv(signals).transpose(1, 2))
        return self.head(torch.relu(self.mix(sequence)).mean(1))


def _as_if_trained(network: nn.Module) -> nn.Module:
    """Parameters without two equal ones, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def _task(network: nn.Module, *shape: int) -> nc.Task:
    data = (torch.randn(32, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 5)
    return nc.Task(_as_if_trained(network), data, data, batch_size=16)


def _bert(**sizes: int) -> nc.Task:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(max_position_embeddings=64, num_attention_heads=4, num_labels=4, **sizes)
    ids = torch.randint(0, config.vocab_size, (32, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    data = (inputs, torch.arange(32) % 4)
    return nc.Task(_as_if_trained(BertForSequenceClassification(config)), data, data, batch_size=16)


KINDS: dict[str, Callable[[], nc.Task]] = {
    "plain": lambda: _task(Plain(), 3, 16, 16),
    "residual": lambda: _task(Residual(), 3, 16, 16),
    "depthwise": lambda: _task(Depthwise(), 3, 16, 16),
    "bert": lambda: _bert(hidden_size=40, num_hidden_layers=1, intermediate_size=72, vocab_size=160),
    "gru": lambda: _task(Sequence(nn.GRU, 28, 1), 9, 30),
    "lstm": lambda: _task(Sequence(nn.LSTM, 24, 2), 9, 30),
    "plain, large": lambda: _task(Plain(120), 3, 16, 16),
    "depthwise, large": lambda: _task(Depthwise(160, 6), 3, 16, 16),
    "bert, large": lambda: _bert(hidden_size=320, num_hidden_layers=2, intermediate_size=1280, vocab_size=6000),
    "bert, too large to measure": lambda: _bert(
        hidden_size=384, num_hidden_layers=2, intermediate_size=1536, vocab_size=6000
    ),
}


def random_config(spec: nc.ModelSpec, rng: np.random.Generator) -> dict[str, Any]:
    """A value for each group and layer, or one for all."""

    def values(names: list[str], choices: list[Any]) -> Any:
        drawn = [choices[int(rng.integers(len(choices)))] for _ in names]
        return dict(zip(names, drawn, strict=True)) if rng.random() < 0.7 else drawn[0]

    method = str(rng.choice(["ptq", "qat", "bnn"], p=[0.5, 0.35, 0.15]))
    config = {
        "prune": {
            "method": "l1_norm",
            "sparsity": values(list(spec.prunable_names), [0.0, 0.0, 0.2, 0.5, 0.8]),
            "round_to": int(rng.choice([1, 4, 8])),
        },
        "low_rank": {"rank": values(list(spec.factorisable_names), [1.0, 1.0, 0.7, 0.4, 0.1])},
        "quantize": {"method": method, "bits": values(list(spec.quantizable_names), list(bits_of(method)))},
    }
    if rng.random() < 0.3:
        config["order"] = ["low_rank", "prune"]
    return config


def exported_bytes(task: nc.Task, config: dict[str, Any]) -> int:
    """Bytes of the file of a config's first step."""
    run = CompressionRun(task, config, epochs=0)
    prepared = prepare(make_candidate(task, run.plan, run.costs, run.trainer), task)
    proto = prepared.export(task)
    return len(file_of(prepared, proto, simulate(prepared, task, prepared.outputs_to_quantize(proto))))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each kind of network the files' sizes and the errors' quantiles."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind and row["bytes"]]
        errors = np.array([row["foretold"] / row["bytes"] - 1 for row in own])
        found[kind] = {
            "configs": len(own),
            "kB": [round(min(row["bytes"] for row in own) / 1e3, 1), round(max(row["bytes"] for row in own) / 1e3, 1)],
            "mean": round(float(errors.mean()), 4),
            "p90": round(float(np.quantile(np.abs(errors), 0.9)), 4),
            "worst": round(float(np.abs(errors).max()), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("cost_bytes.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for kind in arguments.kinds:
        torch.manual_seed(0)
        task = KINDS[kind]()
        costs = nc.CostModel(task)
        rng = np.random.default_rng(list(KINDS).index(kind))
        configs = [random_config(task.spec, rng) for _ in range(arguments.configs)]
        known = {row["number"]: row["bytes"] for row in rows if row["kind"] == kind}
        rows = [row for row in rows if row["kind"] != kind]
        for number, config in enumerate(configs):
            try:
                foretold = round(costs(config)["size_mb"] * 1e6)
                size = known[number] if number in known else exported_bytes(task, config)
            except InfeasibleError:
                foretold = size = 0
            rows.append({"kind": kind, "number": number, "foretold": foretold, "bytes": size})
            if size and abs(foretold / size - 1) > 0.03:
                print(kind, foretold, size, json.dumps(config), flush=True)
            arguments.output.write_text(json.dumps(rows))
        print(kind, summary(rows)[kind], flush=True)


if __name__ == "__main__":
    main()
