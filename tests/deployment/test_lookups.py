from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformer_families import make

import ray_nascomp as nc
from ray_nascomp.deployment import export
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.deployment.templates import Templates


class Positions(nn.Module):
    """A table of positions that is read whole, and one that is also multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(12, 16)
        self.words = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(input_ids) + self.positions(torch.arange(12, device=input_ids.device))
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return (hidden @ self.words.weight.T).mean(1)


@pytest.mark.parametrize("bits", [8, 4])
def test_tables_of_positions_are_stored_in_few_bits(bits, monkeypatch):
    monkeypatch.setattr(export, "_templates", Templates())
    torch.manual_seed(0)
    model = Positions().eval()
    ids = torch.randint(0, 20, (48, 12))
    task = nc.Task(model, (ids, ids[:, 0]), (ids, ids[:, 0]))
    proto = export_onnx(model, ids[:2], task.input_names)
    tables = {node.input[0] for node in proto.graph.node if node.op_type == "Gather"}
    sizes = sorted(tuple(i.dims) for i in proto.graph.initializer if i.name in tables)
    assert (12, 16) in sizes
    assert (20, 16) in sizes
    found = run_session(make_session(proto.SerializeToString()), ids, task.input_names)
    with torch.no_grad():
        assert np.abs(found - model(ids).numpy()).max() < 1e-5
    config = {"quantize": {"bits": {"positions": bits, "words": 32}}}
    step = nc.compress(task, config, epochs=0)
    saved = nc.compress(task, {}, epochs=0).metrics["size_mb"] - step.metrics["size_mb"]
    assert saved * 1e6 > 12 * 16 * (4 - bits / 8) - 400
    assert step.metrics["size_mb"] == pytest.approx(nc.CostModel(task)(config)["size_mb"], rel=0.03)


def test_narrow_whisper_encoders_are_quantized():
    """Of narrow tables torch's exporter carries the look-up out."""
    from transformers import WhisperConfig, WhisperForAudioClassification

    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    tokens = {"vocab_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(num_mel_bins=8, max_source_positions=12, num_labels=3, **sizes, **tokens)
    torch.manual_seed(0)
    data = torch.randn(48, 8, 24), torch.randint(0, 3, (48,))
    task = nc.Task(WhisperForAudioClassification(config), data, data)
    step = nc.compress(task, {"prune": {"sparsity": 0.5}, "quantize": {"bits": 8}}, epochs=0)
    assert step.metrics["feasible"]


def test_rows_that_a_layer_takes_itself_are_found():
    """Whisper's decoder indexes its table of positions."""
    model, inputs = make("whisper")
    task = nc.Task(
        model,
        ({name: torch.cat([tensor] * 24) for name, tensor in inputs.items()}, torch.zeros(48, 7).long()),
        ({name: torch.cat([tensor] * 24) for name, tensor in inputs.items()}, torch.zeros(48, 7).long()),
        loss=lambda outputs, _: outputs.square().mean(),
        metric=lambda outputs, _: float(outputs.abs().mean()),
    )
    config = {"quantize": {"bits": 8}}
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["size_mb"] == pytest.approx(nc.CostModel(task)(config)["size_mb"], rel=0.01)
    assert step.metrics["export_error"] < 0.05
