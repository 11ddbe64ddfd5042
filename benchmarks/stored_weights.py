"""What weights stored in few bits cost and save: bytes and speed against fp32, by kind of layer.

    python benchmarks/stored_weights.py --out benchmarks/results/stored_weights.json

Networks of one kind of layer each, weights random. Layers compute in floating point on weights that are
unfolded when the file is loaded, but for the LSTM of 8 bits, which computes in integers. Speed: medians of
the ratio over rounds in which both files run one after the other, batch size 1, one thread, processor time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from ray_nascomp.compression.static import calibrate_weights
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.recurrent import quantize_recurrent
from ray_nascomp.deployment.runtime import measure_latency

BITS = (8, 4, 2, 1)


class Last(nn.Module):
    """A recurrent layer's outputs alone."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20000, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    convolutions = [layer for _ in range(4) for layer in (nn.Conv2d(96, 96, 3, padding=1), nn.ReLU())]
    linear = [layer for _ in range(4) for layer in (nn.Linear(768, 768), nn.ReLU())]
    return {
        "Conv": (nn.Sequential(*convolutions), torch.randn(2, 96, 24, 24)),
        "Gemm": (nn.Sequential(*linear), torch.randn(2, 768)),
        "MatMul": (nn.Sequential(*linear), torch.randn(2, 32, 768)),
        "embedding": (Tokens(), torch.randint(0, 20000, (2, 32))),
        "GRU": (Last(nn.GRU(256, 256, num_layers=2, batch_first=True)), torch.randn(2, 50, 256)),
        "LSTM": (Last(nn.LSTM(256, 256, num_layers=2, batch_first=True)), torch.randn(2, 50, 256)),
    }


def quantized(network: nn.Module, proto: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    recurrent = {name: bits for name, layer in network.named_modules() if isinstance(layer, nn.RNNBase)}
    if recurrent:
        return quantize_recurrent(proto, network, recurrent)
    layers = (nn.Conv2d, nn.Linear, nn.Embedding)
    names = [name for name, layer in network.named_modules() if isinstance(layer, layers)]
    weights = {name: network.get_submodule(name).weight.detach().clone().numpy() for name in names}
    return insert_quantization(proto, weights, calibrate_weights(network, dict.fromkeys(names, bits)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stored_weights.json"))
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {"versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}}
    for kind, (network, inputs) in networks().items():
        original = export_onnx(network, inputs, ("x",))
        before = compact(onnx.load_from_string(original.SerializeToString()))
        rows = {}
        for bits in BITS:
            state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            content = compact(quantized(network, original, bits))
            network.load_state_dict(state)
            latency = measure_latency(before, content, inputs, ("x",), rounds=options.rounds)
            rows[f"{bits} bits"] = {"bytes_ratio": len(content) / len(before), **asdict(latency)}
            print(kind, bits, rows[f"{bits} bits"], flush=True)
        result[kind] = rows
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
