"""Weights of 4 bits: unfolded when the file is loaded, as we write them, against ONNX Runtime's MatMulNBits.

    python benchmarks/matmul_nbits.py --output benchmarks/results/matmul_nbits.json

Four linear layers of random weights, quantized to the same integers with one scale an output channel.
Speed is that of the floating-point file over the file's: medians over rounds in which both run one after the
other, one thread, processor time. The error is relative (L2) to the network with rounded weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import nn

from ray_nascomp.compression.static import calibrate_weights
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.runtime import make_session, measure_latency, run_session
from ray_nascomp.nni_adapter.scales import LayerScales

BITS = 4


def with_matmul_nbits(
    proto: onnx.ModelProto, weights: dict[str, np.ndarray], scales: dict[str, LayerScales], block: int, accuracy: int
) -> bytes:
    """The file with MatMulNBits in the place of each product; every block has its row's scale.

    Args:
        proto: The network in floating point.
        weights: Layer name -> weight, shape `(out, in)`.
        scales: Layer name -> its scales.
        block: Inputs that share a scale in the file.
        accuracy: ONNX Runtime's accuracy level: 1 computes in floating point, 4 in 8-bit integers.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    kept = [entry for entry in graph.initializer if stored[entry.name].ndim == 1]
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        name = next(name for name, weight in weights.items() if np.array_equal(weight.T, stored[node.input[1]]))
        outputs, inputs = weights[name].shape
        blocks = -(-inputs // block)
        integers = np.pad(scales[name].integers(weights[name]) + 8, ((0, 0), (0, blocks * block - inputs)))
        integers = integers.astype(np.uint8).reshape(outputs, blocks, block // 2, 2)
        packed = integers[..., 0] | integers[..., 1] << 4
        kept.append(numpy_helper.from_array(packed, f"{name}.weight_q"))
        kept.append(numpy_helper.from_array(np.repeat(scales[name].weight, blocks).astype(np.float32), f"{name}_s"))
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits", [node.input[0], f"{name}.weight_q", f"{name}_s"], list(node.output),
                domain="com.microsoft", K=inputs, N=outputs, bits=BITS, block_size=block, accuracy_level=accuracy,
            )
        )  # fmt: skip
    del graph.initializer[:]
    graph.initializer.extend(kept)
    result.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return compact(result)


def measure(width: int, tokens: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU()))).eval()
    inputs = torch.randn(2, tokens, width)
    proto = export_onnx(network, inputs, ("x",))
    dense = compact(onnx.load_from_string(proto.SerializeToString()))
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    weights = {name: network.get_submodule(name).weight.detach().clone().numpy() for name in names}
    scales = calibrate_weights(network, dict.fromkeys(names, BITS))
    files = {"unfolded at load": compact(insert_quantization(proto, weights, scales))}
    for block in (32, 128):
        for accuracy in (1, 4):
            label = f"MatMulNBits, blocks of {block}, accuracy level {accuracy}"
            files[label] = with_matmul_nbits(proto, weights, scales, block, accuracy)
    reference = run_session(make_session(files["unfolded at load"]), inputs, ("x",))
    rows = {}
    for label, content in files.items():
        found = run_session(make_session(content), inputs, ("x",))
        latency = measure_latency(dense, content, inputs, ("x",), rounds=rounds)
        rows[label] = {
            "bytes_ratio": round(len(content) / len(dense), 4),
            "error": round(float(np.linalg.norm(found - reference) / np.linalg.norm(reference)), 5),
            "speed": round(latency.speedup, 3),
            "spread": round(latency.spread, 3),
        }
        print(width, tokens, label, rows[label], flush=True)
    return {"width": width, "tokens": tokens, "files": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/matmul_nbits.json"))
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(width, tokens, arguments.rounds) for width in (384, 768) for tokens in (1, 32, 128)]
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
