"""Distillation: how far a network's outputs are from those of its teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ray_nascomp.tasks.data import IGNORED


def distillation_loss(outputs: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence of softened classes, or the mean squared difference where targets are numbers.

    The former is Hinton's (2015, arXiv 1503.02531), the latter Ba's and Caruana's (2014, arXiv 1312.6184). Numbers
    are values, embeddings, or several labels at once. Places of a sequence whose target is -100 (padding, as for
    `torch.nn.functional.cross_entropy`) do not count.

    Args:
        outputs: The student's outputs; of logits the classes lie along the last axis or, where `targets`
            has the shape of all others, as for `torch.nn.functional.cross_entropy`, along the second.
        teacher: The teacher's outputs, the same shape.
        targets: Class indices, or numbers in floating point.
        temperature: What logits are divided by, above 0.

    Returns:
        A scalar.
    """
    if outputs.dim() > 2 and targets.shape == outputs.shape[:1] + outputs.shape[2:] != outputs.shape[:-1]:
        outputs, teacher = outputs.movedim(1, -1), teacher.movedim(1, -1)
    classes = outputs.shape[-1]
    if targets.is_floating_point() or outputs.dim() == 1 or classes == 1:
        return functional.mse_loss(outputs, teacher)
    if outputs.dim() > 2 and targets.shape == outputs.shape[:-1]:
        counted = targets != IGNORED
        outputs, teacher = outputs[counted], teacher[counted]
    student, target = (
        functional.log_softmax(logits.reshape(-1, classes) / temperature, dim=-1) for logits in (outputs, teacher)
    )
    places = max(1, len(student))
    return functional.kl_div(student, target, reduction="sum", log_target=True) / places * temperature**2
