"""A task made of a HuggingFace model and a data set: what `Task` needs, from their names."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.base import Metric, Task
from ray_nascomp.tasks.calling import main_output
from ray_nascomp.tasks.huggingface_data import Encoder, class_names, is_encoded
from ray_nascomp.tasks.huggingface_kinds import KINDS, CtcLoss, Kind, LibraryMetric, TokenErrorRate, kind_of

_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}


class HuggingFaceTask(Task):
    """A HuggingFace model, its data and its metric.

    Texts are cut and padded to one length, recordings likewise, so that batches stack; the
    model sees real attention masks. Samples are encoded once by the model's own tokenizer or
    feature extractor, which travels along as `processor`.

    Args:
        model: A name on the hub, a folder, or a model of transformers. It is never changed.
        dataset: A name on the hub, a folder of the `datasets` library, a `DatasetDict`, or a dict
            with the splits "train", "validation" and, if there is one, "test". A split is a data
            set whose samples are dicts of columns, or a pair of lists (inputs, labels). A split
            that is encoded already (a torch Dataset of what the model takes and "labels", or a
            pair of tensors) is taken as it is. Training samples of the label None, or -1, have none, as
            those of -100 for `Task`.
        kind: "text_classification", "token_classification", "question_answering",
            "image_classification", "audio_classification", "speech_recognition" (with
            connectionist temporal classification) or "causal_lm"; told by the model's class if
            absent. A model that lacks the head for it gets an untrained one: `finetune` it.
        processor: The tokenizer, image processor or feature extractor; loaded from the model's
            name or folder if absent.
        inputs: Column of the input; two for pairs of texts.
        labels: Column of the target.
        max_length: Tokens of every text, or samples of every recording; those of the longest
            training sample if absent, at most what the model takes.
        metric: A function (outputs, targets) -> float, a metric of the `evaluate` library by its
            name, or the kind's own if absent: accuracy, "token_accuracy", "span_f1",
            "token_error_rate" (less is better) or "perplexity" (less is better).
        mode: Whether more of a metric that is given is better ("max", the default) or less ("min").
        loss: Function (outputs, targets) -> scalar tensor; the kind's own if absent.
        build: As for `Task`; see also `elastic`.
        architecture: As for `Task`.
        batch_size: Samples a training step.
        original: As for `Task`.

    Attributes:
        kind: The kind's name.
        processor: What encoded the samples; None where they came encoded.
        max_length: Tokens of every text, or samples of every recording; None for images.

    Raises:
        ConfigError: For an unknown kind, split, column or label, and whatever `Task` refuses.
    """

    learning_rates = (1e-5, 5e-4)
    """Range of learning rates that suits fine-tuning a pretrained transformer."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        dataset: Any,
        *,
        kind: str | None = None,
        processor: Any = None,
        inputs: str | tuple[str, ...] | None = None,
        labels: str | None = None,
        max_length: int | None = None,
        metric: str | Metric | None = None,
        mode: Literal["max", "min"] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        build: Callable[[dict[str, Any]], nn.Module] | None = None,
        architecture: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        original: Task | None = None,
    ) -> None:
        if kind is not None and kind not in KINDS:
            raise ConfigError.unknown("kind", kind, KINDS)
        chosen = KINDS[kind] if kind is not None else kind_of(_class_name(model))
        columns = (inputs,) if isinstance(inputs, str) else (inputs or chosen.inputs)
        column = labels or chosen.labels
        splits = _splits(dataset)
        names = class_names(splits["train"], column) if chosen.has_classes else None
        network = _load(model, chosen, names)
        label_ids = _label_ids(network.config, names)
        self.kind = chosen.name
        self.processor = processor
        self.max_length = max_length
        self._keeps_cache = bool(getattr(network.config, "use_cache", False))
        if self._keeps_cache:
            # A cache of keys and values is of no use here, and no exporter takes it.
            network.config.use_cache = False
        input_name = network.main_input_name
        data = {}
        for name, split in splits.items():
            if is_encoded(split, input_name):
                pair = isinstance(split, (tuple, list)) and len(split) == 2 and isinstance(split[0], Tensor)
                data[name] = ({input_name: split[0]}, split[1]) if pair else split
                continue
            encoder = Encoder(chosen, self._processor(model), columns, column, self.max_length, label_ids)
            rows = encoder.rows(split, name)
            if encoder.max_length is None and chosen.modality != "image" and name == "train":
                self.max_length = encoder.max_length = _default_length(encoder, rows, network.config)
            data[name] = encoder.encode(rows)
        own_loss, own_metric = chosen.loss, chosen.metric
        if chosen.name == "speech_recognition":
            own_loss, own_metric = CtcLoss(network.config.pad_token_id), TokenErrorRate(network.config.pad_token_id)
        if isinstance(metric, str):
            metric = metric if metric == "accuracy" else LibraryMetric(metric)
        super().__init__(
            network,
            data["train"],
            data["validation"],
            test_data=data.get("test"),
            metric=metric or own_metric,
            mode=(mode or "max") if metric else (mode or chosen.mode),
            loss=loss or own_loss,
            build=build,
            architecture=architecture,
            batch_size=batch_size,
            original=original,
        )

    def finetune(self, **arguments: Any) -> HuggingFaceTask:
        """Trains a copy of the model with transformers' `Trainer` on the task's loss.

        Args:
            **arguments: Fields of `transformers.TrainingArguments`: `num_train_epochs`,
                `learning_rate`, `seed`, ...

        Returns:
            A task with the trained model and the same data. Nothing is written to disk unless
            `output_dir` is given.

        Raises:
            ConfigError: If the task's architectures were made from the untrained model.
        """
        from transformers import PrinterCallback, Trainer, TrainingArguments

        if getattr(self.build, "inherits", False):
            raise ConfigError(
                "finetune: the architectures hold this model's weights; fine-tune first, then call elastic()"
            )
        model = copy.deepcopy(self.model)
        data = self.train_data

        def collate(indices: list[int]) -> dict[str, Any]:
            inputs, targets = data.take(torch.tensor(indices))
            return {**inputs, "labels": targets}

        def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return self.loss(main_output(outputs), labels)

        with tempfile.TemporaryDirectory() as folder, _own_randomness():
            defaults = {
                "output_dir": folder,
                "per_device_train_batch_size": self.batch_size,
                "save_strategy": "no",
                "logging_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": torch.cuda.is_available(),
            }
            trainer = Trainer(
                model,
                TrainingArguments(**{**defaults, **arguments}),
                data_collator=collate,
                train_dataset=range(len(data)),
                compute_loss_func=compute_loss,
            )
            # The loss is a mean over the batch, which several accumulated batches have to share.
            trainer.loss_is_scaled_for_ga = False
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        # Trainer leaves things in a model that do not travel to workers (seen with Wav2Vec2).
        trained = copy.deepcopy(self.model)
        trained.load_state_dict(model.cpu().state_dict())
        return self.with_changes(model=trained.eval())

    def elastic(self, **options: Any) -> HuggingFaceTask:
        """The task with smaller forms of its model to search.

        Depth, heads and widths of a transformer; depth, widths, kernels and resolution of a
        convolutional network (ResNet, MobileNet).

        Args:
            **options: Those of `ray_nascomp.architecture.elastic_transformer` or, for a model without
                transformer blocks, of `ray_nascomp.architecture.elastic_cnn`.

        Returns:
            A task with the same model and data, and an architecture space.

        Raises:
            ConfigError: If the model is of a family that has no elastic form.
        """
        from ray_nascomp.architecture import elastic_cnn, elastic_transformer, find_blocks

        build: Any
        if find_blocks(self.model):
            build, architecture = elastic_transformer(self.model, task=self, **options)
        else:
            build, architecture = elastic_cnn(self.model, self.example_inputs, task=self, **options)
        return self.with_changes(build=build, architecture=architecture)

    def save_pretrained(
        self, network: nn.Module, folder: str | Path, metrics: Mapping[str, float] | None = None
    ) -> Path:
        """Saves a compressed network as transformers does, with the processor and a model card.

        `AutoModel...from_pretrained(folder)` loads it where all layers have one shape that the
        config can tell; otherwise with `trust_remote_code=True`, as the folder then holds the
        code that gives layers their own shapes. Neither needs ray-nascomp.

        Args:
            network: A network made from this task's model.
            folder: Where the files go.
            metrics: Measured figures for the model card.

        Raises:
            ConfigError: If the network has layers that the model has not.
        """
        from ray_nascomp.architecture import save_network, write_card

        target = Path(folder)
        kind = KINDS[self.kind]
        is_plain = save_network(network, target, kind.auto_class, self._keeps_cache)
        if self.processor is not None:
            self.processor.save_pretrained(target)
        config: Any = self.model.config
        name = config._name_or_path
        fields = {
            "auto_class": kind.auto_class,
            "pipeline_tag": kind.tag,
            "base_model": "" if not name or Path(name).exists() else name,
        }
        write_card(target, fields, metrics or {}, is_plain)
        return target

    def _processor(self, model: Any) -> Any:
        """The processor; loaded when the first split needs it."""
        if self.processor is None:
            source = model if isinstance(model, (str, Path)) else model.config._name_or_path
            if not source:
                raise ConfigError(
                    "processor: none was given, and the model came from no name or folder to load one from"
                )
            kind = KINDS[self.kind]
            self.processor = _load_processor(str(source), kind)
        tokenizer = getattr(self.processor, "tokenizer", None) or self.processor
        if getattr(tokenizer, "pad_token", "") is None:
            # GPT-2 and its like were trained without padding; the mask hides it.
            self.processor = copy.deepcopy(self.processor)
            tokenizer = getattr(self.processor, "tokenizer", None) or self.processor
            tokenizer.pad_token = tokenizer.eos_token
        return self.processor


def _splits(dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, (str, Path)):
        import datasets

        path = Path(dataset)
        dataset = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(str(dataset))
    if not isinstance(dataset, Mapping):
        raise ConfigError(
            f"dataset: a {type(dataset).__name__} was given; allowed: a name, a folder, or a dict of the splits "
            "'train', 'validation' and 'test'"
        )
    found = {name: next((dataset[key] for key in keys if key in dataset), None) for name, keys in _SPLITS.items()}
    for name in ("train", "validation"):
        if found[name] is None:
            raise ConfigError(f"dataset: the split {name!r} is missing; it has {', '.join(map(repr, dataset))}")
    return {name: split for name, split in found.items() if split is not None}


def _class_name(model: Any) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(str(model)).architectures or [""]
    return str(names[0])


def _load(model: Any, kind: Kind, names: list[str] | None) -> Any:
    """The model, with a head for as many classes as there are."""
    import transformers

    if isinstance(model, nn.Module):
        if not isinstance(model, transformers.PreTrainedModel):
            raise ConfigError(
                f"model: a {type(model).__name__} is not a model of transformers; nc.Task takes any module"
            )
        # Model and config are changed below and in `__init__`, and they are the user's.
        return copy.deepcopy(model) if getattr(model.config, "use_cache", False) else model
    config = transformers.AutoConfig.from_pretrained(str(model))
    changes: dict[str, Any] = {}
    if names is not None and not set(names) <= set(_own_label_ids(config)):
        changes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    network = getattr(transformers, kind.auto_class).from_pretrained(str(model), **changes)
    loaded: nn.Module = network.eval()
    return loaded


def _label_ids(config: Any, names: list[str] | None) -> dict[str, int]:
    own = _own_label_ids(config)
    if names is None or set(names) <= set(own):
        return own
    if len(names) > config.num_labels:
        raise ConfigError(f"model: its head has {config.num_labels} classes, the data has {len(names)}")
    return {name: i for i, name in enumerate(names)}


def _own_label_ids(config: Any) -> dict[str, int]:
    """Those of the config; some kinds, such as PVT's, come without, and get the names that the others have."""
    return dict(config.label2id or {f"LABEL_{number}": number for number in range(config.num_labels)})


def _load_processor(source: str, kind: Kind) -> Any:
    import transformers

    loader = {
        "text": transformers.AutoTokenizer,
        "words": transformers.AutoTokenizer,
        "image": transformers.AutoImageProcessor,
        "audio": transformers.AutoFeatureExtractor if kind.has_classes else transformers.AutoProcessor,
    }[kind.modality]
    return loader.from_pretrained(source)


def _default_length(encoder: Encoder, rows: Any, config: Any) -> int:
    longest = encoder.longest(rows)
    if encoder.kind.modality == "audio":
        return longest
    positions = getattr(config, "max_position_embeddings", None) or longest
    return int(min(longest, encoder.tokenizer.model_max_length, positions))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keeps the process's generators as they are: Trainer seeds all of them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
