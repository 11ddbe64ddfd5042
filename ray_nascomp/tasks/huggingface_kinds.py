"""Kinds of HuggingFace tasks: what each reads from a data set, its loss and its metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.data import IGNORED


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the labelled positions.

    Args:
        outputs: Logits, shape `(samples, tokens, classes)`.
        targets: Classes, shape `(samples, tokens)`; -100 where there is none.
    """
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def token_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of labelled positions whose class is right; shapes as in `token_loss`."""
    labelled = targets != IGNORED
    return (outputs.argmax(-1) == targets)[labelled].float().mean().item()


def span_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of a span's first and last token.

    Args:
        outputs: Logits of the first and of the last token, shape `(samples, tokens, 2)`.
        targets: Positions of the first and the last token, shape `(samples, 2)`.
    """
    return functional.cross_entropy(outputs, targets)


def span_f1(outputs: Tensor, targets: Tensor) -> float:
    """Mean F1 of the most likely spans' tokens (Rajpurkar et al. 2016, arXiv 1606.05250); shapes as in `span_loss`."""
    first, last = outputs.unbind(-1)
    # The best span that does not end before it starts.
    scores = (first[:, :, None] + last[:, None, :]).triu() + torch.full(
        (outputs.shape[1], outputs.shape[1]), -torch.inf
    ).tril(-1)
    best = scores.flatten(1).argmax(1)
    found = torch.stack([best // outputs.shape[1], best % outputs.shape[1]], 1)
    overlap = (torch.minimum(found[:, 1], targets[:, 1]) - torch.maximum(found[:, 0], targets[:, 0]) + 1).clamp(min=0)
    lengths = (found[:, 1] - found[:, 0] + 1) + (targets[:, 1] - targets[:, 0] + 1)
    return (2 * overlap / lengths).mean().item()


def next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token given those before it.

    Args:
        outputs: Logits, shape `(samples, tokens, vocabulary)`.
        targets: The tokens themselves, shape `(samples, tokens)`; -100 for padding.
    """
    return token_loss(outputs[:, :-1], targets[:, 1:])


def perplexity(outputs: Tensor, targets: Tensor) -> float:
    """Exponential of the mean `next_token_loss` over all tokens."""
    return next_token_loss(outputs, targets).exp().item()


@dataclass(frozen=True)
class CtcLoss:
    """Connectionist temporal classification (Graves et al. 2006) over whole, padded recordings.

    Attributes:
        blank: Class of the blank.
    """

    blank: int

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits `(samples, frames, classes)` for texts `(samples, characters)` padded with -100."""
        samples, frames, _ = outputs.shape
        lengths = (targets != IGNORED).sum(1)
        return functional.ctc_loss(
            outputs.float().log_softmax(-1).transpose(0, 1),
            targets.clamp(min=0),
            torch.full((samples,), frames),
            lengths,
            blank=self.blank,
            zero_infinity=True,
        )


@dataclass(frozen=True)
class TokenErrorRate:
    """Edit distance of greedily decoded texts, over the number of true tokens: the character error rate for characters.

    Attributes:
        blank: Class of the blank.
    """

    blank: int

    @property
    def __name__(self) -> str:
        """What the metric is reported as."""
        return "token_error_rate"

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """The rate of logits `(samples, frames, classes)` for texts `(samples, characters)` padded with -100."""
        errors = total = 0
        for frames, text in zip(outputs.argmax(-1), targets, strict=True):
            decoded = [int(token) for token in frames.unique_consecutive() if token != self.blank]
            true = [int(token) for token in text if token != IGNORED]
            errors += edit_distance(decoded, true)
            total += len(true)
        return errors / max(1, total)


def edit_distance(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Fewest insertions, deletions and replacements that make one sequence of the other (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


@dataclass(frozen=True)
class LibraryMetric:
    """A metric of the `evaluate` library on predicted classes.

    Attributes:
        source: Its name there, or the path of a metric's script.
    """

    source: str

    @property
    def __name__(self) -> str:
        """What the metric is reported as."""
        return Path(self.source).stem

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric of logits, shape `(..., classes)`, at positions that have a label, shape `(...)`."""
        import evaluate

        labelled = targets != IGNORED
        metric = evaluate.load(self.source)
        result = metric.compute(
            predictions=outputs.argmax(-1)[labelled].tolist(), references=targets[labelled].tolist()
        )
        return float(next(iter(result.values())))


@dataclass(frozen=True)
class Kind:
    """What one kind of task needs.

    Attributes:
        name: Its name in `HuggingFaceTask(kind=...)`.
        auto_class: transformers' class that loads such models.
        mapping: transformers' table of these models' classes.
        inputs: Columns that a sample's input is read from, if no others are named.
        labels: Column that its target is read from, if no other is named.
        modality: What the inputs are.
        has_classes: Whether labels are classes, whose number the model's head has.
        loss: Function (outputs, targets) -> scalar tensor; None for cross entropy.
        metric: Metric of `Task`.
        mode: Whether more of it is better.
        hub_name: What the hub calls such models, if that is another name.
    """

    name: str
    auto_class: str
    mapping: str
    inputs: tuple[str, ...]
    labels: str
    modality: Literal["text", "words", "image", "audio"]
    has_classes: bool = True
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    metric: str | Callable[[Tensor, Tensor], float] = "accuracy"
    mode: Literal["max", "min"] = "max"
    hub_name: str = ""

    @property
    def tag(self) -> str:
        """What the hub calls such models."""
        return self.hub_name or self.name.replace("_", "-")


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "text_classification",
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            ("text",),
            "label",
            "text",
        ),
        Kind(
            "token_classification",
            "AutoModelForTokenClassification",
            "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
            ("tokens",),
            "tags",
            "words",
            loss=token_loss,
            metric=token_accuracy,
        ),
        Kind(
            "question_answering",
            "AutoModelForQuestionAnswering",
            "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
            ("question", "context"),
            "answers",
            "text",
            has_classes=False,
            loss=span_loss,
            metric=span_f1,
        ),
        Kind(
            "image_classification",
            "AutoModelForImageClassification",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
            ("image",),
            "label",
            "image",
        ),
        Kind(
            "audio_classification",
            "AutoModelForAudioClassification",
            "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
            ("audio",),
            "label",
            "audio",
        ),
        Kind(
            "speech_recognition",
            "AutoModelForCTC",
            "MODEL_FOR_CTC_MAPPING_NAMES",
            ("audio",),
            "text",
            "audio",
            has_classes=False,
            mode="min",
            hub_name="automatic-speech-recognition",
        ),
        Kind(
            "causal_lm",
            "AutoModelForCausalLM",
            "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            ("text",),
            "text",
            "text",
            has_classes=False,
            loss=next_token_loss,
            metric=perplexity,
            mode="min",
            hub_name="text-generation",
        ),
    )
}


def kind_of(model_class: str) -> Kind:
    """The kind that a class of transformers is made for.

    Args:
        model_class: Name of the class, "BertForSequenceClassification", or of a compressed one.

    Raises:
        ConfigError: If it is not made for any of them.
    """
    from transformers.models.auto import modeling_auto

    for kind in KINDS.values():
        if model_class.removeprefix("Compressed") in getattr(modeling_auto, kind.mapping).values():
            return kind
    raise ConfigError(f"kind: a {model_class} does not tell it; give one of {', '.join(KINDS)}")
