from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_families import make


def trainer_of(model: Any, folder: Any) -> Any:
    import nni
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 100, (64, 12), generator=generator)
    rows = [{"input_ids": row, "labels": (row == 7).any().long()} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return nni.trace(Trainer)(model=model, args=arguments, train_dataset=rows)


@pytest.mark.slow
def test_pruning_by_taylor_scores_trains_through_the_trainer(tmp_path: Any) -> None:
    from nni.compression.pruning import TaylorPruner

    from ray_nascomp.nni_adapter.trainer_evaluator import TrainerEvaluator

    model, _ = make("bert", num_labels=2)
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    evaluator = TrainerEvaluator(trainer_of(model, tmp_path))
    name = "bert.encoder.layer.0.intermediate.dense"
    pruner = TaylorPruner(model, [{"op_names": [name], "sparse_ratio": 0.5}], evaluator, training_steps=4)
    _, masks = pruner.compress()
    kept = masks[name]["weight"].amax(1)
    assert kept.sum() == 48
    pruner.unwrap_model()
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)  # It was trained.


@pytest.mark.slow
def test_quantization_aware_training_sees_every_step_of_the_trainer(tmp_path: Any) -> None:
    from nni.compression.quantization import QATQuantizer

    from ray_nascomp.nni_adapter.trainer_evaluator import TrainerEvaluator

    model, _ = make("bert", num_labels=2)
    name = "bert.encoder.layer.1.output.dense"
    config = [{"op_names": [name], "quant_dtype": "int8", "target_names": ["weight", "_input_"]}]
    evaluator = TrainerEvaluator(trainer_of(model, tmp_path))
    steps: list[int] = []
    bind = evaluator.bind_model

    def bind_and_count(*arguments: Any) -> None:
        bind(*arguments)
        evaluator.patch_optimizer_step([], [lambda: steps.append(1)])

    evaluator.bind_model = bind_and_count
    quantizer = QATQuantizer(model, config, evaluator, quant_start_step=1)
    _, calibration = quantizer.compress(max_steps=6, max_epochs=None)
    assert len(steps) == 6
    assert calibration[name]["weight"]["scale"].min() > 0
    assert calibration[name]["_input_0"]["tracked_max"].max() > 0
