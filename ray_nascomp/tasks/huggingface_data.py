"""Samples of a data set, encoded by a model's own tokenizer or feature extractor into tensors of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.data import IGNORED
from ray_nascomp.tasks.huggingface_kinds import Kind

_EAGER_BYTES = 1 << 30
"""Encoded data up to this size is kept; larger data is encoded sample by sample, when it is needed."""
_CHUNK = 256
_UNLABELLED = -1
"""What the hub's data sets have where a sample has no class."""


@dataclass
class Encoder:
    """Makes tensors of samples.

    Attributes:
        kind: The kind of task.
        processor: Tokenizer, image processor, feature extractor, or a processor that holds both.
        inputs: Columns of the input: one, or two for pairs of texts.
        labels: Column of the target.
        max_length: Tokens that every text is cut and padded to, or samples of a recording.
        label_ids: Class of each label that is not a number.
        text_length: Tokens that every transcript is padded to.
    """

    kind: Kind
    processor: Any
    inputs: tuple[str, ...]
    labels: str
    max_length: int | None
    label_ids: Mapping[str, int]
    text_length: int | None = None

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of text."""
        return getattr(self.processor, "tokenizer", None) or self.processor

    def rows(self, split: Any, name: str) -> Sequence[Mapping[str, Any]]:
        """A split as a sequence of samples, each a mapping of columns.

        Args:
            split: Anything with samples that are mappings, or a pair (inputs, labels) of lists.
            name: What the split is called in errors.

        Raises:
            ConfigError: If a column is missing, or the two lists differ in length.
        """
        if isinstance(split, (tuple, list)) and len(split) == 2 and not isinstance(split[0], Mapping):
            inputs, labels = split
            if len(inputs) != len(labels):
                raise ConfigError(f"{name}: {len(inputs)} inputs were given with {len(labels)} labels")
            pairs = len(self.inputs) > 1
            split = [
                {**dict(zip(self.inputs, value if pairs else (value,), strict=True)), self.labels: label}
                for value, label in zip(inputs, labels, strict=True)
            ]
        if not len(split):
            raise ConfigError(f"{name}: it is empty; at least one sample is needed")
        for column in (*self.inputs, self.labels):
            if column not in split[0]:
                raise ConfigError.unknown(f"{name}: column", column, list(split[0]))
        return split

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The samples as a pair (inputs, targets) of tensors, or as a dataset that encodes them when asked."""
        encoder = replace(self, text_length=self._longest_text(rows)) if self._transcribes else self
        first, target = encoder.encode_some([rows[0]])
        size = sum(tensor.nbytes for tensor in (*first.values(), target))
        if size * len(rows) > _EAGER_BYTES:
            return EncodedDataset(encoder, rows)
        parts = [
            encoder.encode_some([rows[i] for i in range(start, min(start + _CHUNK, len(rows)))])
            for start in range(0, len(rows), _CHUNK)
        ]
        inputs = {key: torch.cat([part[0][key] for part in parts]) for key in first}
        return inputs, torch.cat([part[1] for part in parts])

    def encode_some(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Samples as inputs and targets."""
        columns = [[row[column] for row in rows] for column in self.inputs]
        labels = [row[self.labels] for row in rows]
        if self.kind.modality == "image":
            return dict(self.processor(images=columns[0], return_tensors="pt")), self._classes(labels)
        if self.kind.modality == "audio":
            return self._recordings(columns[0]), self._texts(labels) if self._transcribes else self._classes(labels)
        encoded = self._tokens(columns, padding="max_length", max_length=self.max_length)
        if self.kind.name == "question_answering":
            targets = torch.tensor([_span(encoded, i, label) for i, label in enumerate(labels)])
        elif self.kind.modality == "words":
            targets = torch.tensor([self._tags(encoded.word_ids(i), label) for i, label in enumerate(labels)])
        elif self.kind.name == "causal_lm":
            targets = torch.tensor(encoded["input_ids"])
            targets[torch.tensor(encoded["attention_mask"]) == 0] = IGNORED
        else:
            targets = self._classes(labels)
        known = set(self.tokenizer.model_input_names)
        return {key: torch.tensor(value) for key, value in encoded.items() if key in known}, targets

    def longest(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """The largest number of tokens of a sample, or of samples of a recording."""
        if self.kind.modality == "audio":
            return max(len(_waveform(row[self.inputs[0]])) for row in rows)
        columns = [[row[column] for row in rows] for column in self.inputs]
        return max(map(len, self._tokens(columns, padding=False, max_length=None)["input_ids"]))

    @property
    def _transcribes(self) -> bool:
        return self.kind.name == "speech_recognition"

    def _tokens(self, columns: list[list[Any]], padding: Any, max_length: int | None) -> Any:
        return self.tokenizer(
            *columns,
            padding=padding,
            max_length=max_length,
            truncation="only_second" if self.kind.name == "question_answering" else True,
            is_split_into_words=self.kind.modality == "words",
            return_offsets_mapping=self.kind.name == "question_answering",
        )

    def _recordings(self, recordings: list[Any]) -> dict[str, Tensor]:
        extractor = getattr(self.processor, "feature_extractor", None) or self.processor
        rate = extractor.sampling_rate
        for recording in recordings:
            given = recording.get("sampling_rate", rate) if isinstance(recording, Mapping) else rate
            if given != rate:
                raise ConfigError(f"{self.inputs[0]}: a recording has {given} samples a second, the model takes {rate}")
        length = {"max_length": self.max_length} if self.max_length is not None else {}
        encoded = extractor(
            [_waveform(recording) for recording in recordings],
            sampling_rate=rate,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            **length,
        )
        return dict(encoded)

    def _texts(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(texts, padding="max_length", max_length=self.text_length, return_tensors="pt")
        return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)

    def _longest_text(self, rows: Sequence[Mapping[str, Any]]) -> int:
        return max(len(self.tokenizer(row[self.labels])["input_ids"]) for row in rows)

    def _classes(self, labels: list[Any]) -> Tensor:
        return torch.tensor([self._class(label) for label in labels])

    def _class(self, label: Any) -> int:
        if is_missing(label):
            return IGNORED
        if isinstance(label, str):
            if label not in self.label_ids:
                raise ConfigError.unknown(self.labels, label, self.label_ids)
            return self.label_ids[label]
        return int(label)

    def _tags(self, words: list[int | None], tags: list[Any]) -> list[int]:
        """A word's tag on its first token, as in Devlin et al. 2018 (arXiv 1810.04805)."""
        previous = [None, *words]
        return [
            IGNORED if word is None or word == before else self._class(tags[word])
            for before, word in zip(previous, words, strict=False)
        ]


class EncodedDataset(Dataset[dict[str, Tensor]]):
    """Samples that are encoded when they are asked for."""

    def __init__(self, encoder: Encoder, rows: Sequence[Mapping[str, Any]]) -> None:
        self._encoder = encoder
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = self._encoder.encode_some([self._rows[index]])
        return {**{key: value[0] for key, value in inputs.items()}, "labels": targets[0]}


def is_encoded(split: Any, input_name: str) -> bool:
    """Whether a split holds what the model takes rather than what its processor takes."""
    if isinstance(split, (tuple, list)) and len(split) == 2 and isinstance(split[1], Tensor):
        return isinstance(split[0], (Tensor, Mapping))
    return len(split) > 0 and isinstance(split[0], Mapping) and input_name in split[0]


def is_missing(label: Any) -> bool:
    """Whether a sample has no label: None or NaN, or the number that the hub's data sets have there."""
    return label is None or label != label or label == _UNLABELLED


def class_names(split: Any, column: str) -> list[str] | None:
    """The names of a split's classes, in the order of their numbers.

    Labels that are numbers give transformers' own names, LABEL_0, LABEL_1, ...

    Returns:
        The names; None for an encoded data set, whose labels only its samples tell, and where no sample has one.
    """
    if isinstance(split, (tuple, list)) and len(split) == 2 and not isinstance(split[0], Mapping | Tensor):
        return _names_in(split[1])
    if isinstance(split, (tuple, list)) and len(split) == 2 and isinstance(split[1], Tensor):
        return _names_in(split[1].flatten().tolist())
    feature: Any = (getattr(split, "features", None) or {}).get(column)
    feature = getattr(feature, "feature", feature)  # A sequence of labels.
    if hasattr(feature, "names"):
        return list(feature.names)
    if column not in split[0] or isinstance(split[0][column], Tensor):
        return None
    return _names_in([split[i][column] for i in range(len(split))])


def _names_in(labels: Sequence[Any]) -> list[str] | None:
    flat = {name for label in labels for name in (label if isinstance(label, (list, tuple, np.ndarray)) else [label])}
    flat = {name for name in flat if not is_missing(name)}
    if not flat:
        return None
    if all(isinstance(name, str) for name in flat):
        return sorted(flat)
    return [f"LABEL_{i}" for i in range(int(max(flat)) + 1)]


def _span(encoded: Any, index: int, answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), the special token, where there is none in the text's window."""
    if not len(answers["text"]):
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [
        token
        for token, (sequence, (first, last)) in enumerate(
            zip(encoded.sequence_ids(index), encoded["offset_mapping"][index], strict=True)
        )
        if sequence == 1 and first < end and last > start
    ]
    is_whole = bool(inside) and encoded["offset_mapping"][index][inside[-1]][1] >= end
    return (inside[0], inside[-1]) if is_whole else (0, 0)


def _waveform(recording: Any) -> np.ndarray:
    values = recording["array"] if isinstance(recording, Mapping) else recording
    return np.asarray(values, dtype=np.float32)
