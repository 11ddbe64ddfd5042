"""NNI's evaluator for the `Trainer` of transformers, mended for today's releases.

For those who compress with NNI under their own Trainer; our own stages train through
`ray_nascomp.nni_adapter.evaluator`. Three places of NNI 3.0 do not fit Trainer 5: the loss is
called with a further argument, `trainer.deepspeed` is there without being used, and the
optimizer is made by a function of another signature.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import nni
from nni.compression import TransformersEvaluator
from torch import Tensor, nn
from transformers import TrainerCallback


class TrainerEvaluator(TransformersEvaluator):
    """An evaluator whose compressors train and calibrate through a `Trainer`.

    Args:
        trainer: `nni.trace(transformers.Trainer)(model=..., args=..., ...)`, with or without an
            optimizer of its own, which then has to be traced as well.
        dummy_input: As for NNI's own evaluator.
    """

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        trainer = self.traced_trainer
        if trainer.optimizer is None:
            make, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, pure_model)
            decayed = set(trainer.get_decay_parameter_names(pure_model))
            named = [(name, p) for name, p in pure_model.named_parameters() if p.requires_grad]
            trainer.optimizer = nni.trace(make)(
                [
                    {"params": [p for name, p in named if name in decayed], "weight_decay": trainer.args.weight_decay},
                    {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
                ],
                **settings,
            )
        super()._init_optimizer_helpers(pure_model)

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """Puts a function of the loss and the batch between the Trainer's loss and its gradient."""
        compute_loss = self.trainer.compute_loss

        def patched(_trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            result = compute_loss(model, inputs, return_outputs=return_outputs, **more)
            return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

        self.trainer.compute_loss = types.MethodType(patched, self.trainer)

    def patch_optimizer_step(
        self, before_step_tasks: list[Callable[[], Any]], after_step_tasks: list[Callable[[], Any]]
    ) -> None:
        """Runs functions before and after every step of the optimizer."""
        callback = _StepTasks(before_step_tasks, after_step_tasks)
        self._step_tasks = [*getattr(self, "_step_tasks", []), callback]
        self.trainer.add_callback(callback)

    def unbind_model(self) -> None:
        """Gives the model back."""
        if self.model is not None:
            for callback in getattr(self, "_step_tasks", []):
                self.trainer.remove_callback(callback)
            self._step_tasks = []
        super().unbind_model()


class _StepTasks(TrainerCallback):
    """What runs around the steps of the optimizer that training really uses."""

    def __init__(self, before: list[Callable[[], Any]], after: list[Callable[[], Any]]) -> None:
        self._before = before
        self._after = after

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        optimizer = more["optimizer"]
        step = optimizer.step

        def patched(_optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
            for task in self._before:
                task()
            result = step(*arguments, **keywords)
            for task in self._after:
                task()
            return result

        optimizer.step = types.MethodType(patched, optimizer)
