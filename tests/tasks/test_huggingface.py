from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformer_families import make

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.huggingface_kinds import CtcLoss, TokenErrorRate, edit_distance, perplexity, span_f1
from ray_nascomp.tasks.known import find_task
from ray_nascomp.tasks.transport import pack, unpack

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "poor", "film", "plot"),
    *("was", "the", "a", "is", "it", "where", "not", "so", "very", "book"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Sentences whose one telling word is somewhere among others."""
    rng = random.Random(seed)
    texts, labels = [], []
    for i in range(count):
        words = rng.choices(WORDS[8:], k=rng.randint(2, 6))
        words.insert(rng.randint(0, len(words)), rng.choice(WORDS[4 + i % 2 : 8 : 2]))
        texts.append(" ".join(words))
        labels.append(i % 2)
    return texts, labels


def splits(train: int = 32, val: int = 16) -> dict[str, Any]:
    return {"train": sentences(train), "validation": sentences(val, 1), "test": sentences(val, 2)}


@pytest.fixture(scope="module")
def text_task(tokenizer: Any) -> nc.HuggingFaceTask:
    model, _ = make("bert", num_labels=2, hidden_dropout_prob=0.0)
    return nc.HuggingFaceTask(model, splits(256, 64), processor=tokenizer, inputs="text")


def test_texts_become_masked_tensors_of_one_length(text_task: nc.HuggingFaceTask) -> None:
    inputs, targets = text_task.train_data.head(4)
    assert text_task.kind == "text_classification"
    assert text_task.max_length == 9  # Seven words and two special tokens.
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 9)
    assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] != 0).long())
    assert targets.tolist() == [0, 1, 0, 1]
    assert len(text_task.test_data) == 64
    # Padding changes nothing: the mask is real.
    short = {name: tensor[:1, : int(inputs["attention_mask"][0].sum())] for name, tensor in inputs.items()}
    predict = text_task.predict(text_task.model)
    torch.testing.assert_close(predict(short), predict(inputs)[:1], atol=1e-5, rtol=0)


def test_finetuning_trains_a_copy_with_the_trainer_and_leaves_generators_alone(text_task: nc.HuggingFaceTask) -> None:
    before = copy.deepcopy(text_task.model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trained = text_task.finetune(num_train_epochs=6, learning_rate=2e-3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in text_task.model.state_dict().items())
    assert text_task.evaluate(text_task.predict(text_task.model)) < 0.8
    assert trained.evaluate(trained.predict(trained.model)) > 0.95
    assert trained.test_data is text_task.test_data
    assert find_task(trained.fingerprint) is trained


def test_a_task_travels_to_workers_with_its_tokenizer(text_task: nc.HuggingFaceTask) -> None:
    arrived = unpack(pack(text_task))
    assert arrived.test_data is None
    assert arrived.processor("so good")["input_ids"] == [2, 17, 4, 3]
    inputs = text_task.example_inputs
    assert torch.equal(arrived.predict(arrived.model)(inputs), text_task.predict(text_task.model)(inputs))


def test_an_elastic_task_searches_rates_that_suit_a_pretrained_model(text_task: nc.HuggingFaceTask) -> None:
    elastic = text_task.elastic(heads=(0.5, 1.0))
    space = nc.compression_space(elastic)
    assert space["architecture"]["bert.encoder.layer.0"]["heads"].categories == [2, 4]
    assert (space["finetune"]["lr"].lower, space["finetune"]["lr"].upper) == (1e-5, 5e-4)
    assert elastic.train_data is text_task.train_data
    assert text_task.build is None
    with pytest.raises(ConfigError, match="fine-tune first, then call elastic"):
        elastic.finetune(num_train_epochs=1)


def test_data_sets_with_named_classes_and_pairs_of_texts(tokenizer: Any) -> None:
    import datasets

    texts, labels = sentences(12)
    features = datasets.Features(
        premise=datasets.Value("string"), claim=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    split = datasets.Dataset.from_dict({"premise": texts, "claim": texts, "label": labels}, features)
    model, _ = make("distilbert", num_labels=2)
    data = datasets.DatasetDict(train=split, validation=split)
    task = nc.HuggingFaceTask(model, data, processor=tokenizer, inputs=("premise", "claim"), max_length=12)
    assert task.train_data.head(1)[0]["input_ids"].shape == (1, 12)
    named = {"train": (texts, ["yes" if label else "no" for label in labels]), "validation": (texts, ["no"] * 12)}
    task = nc.HuggingFaceTask(model, named, processor=tokenizer)
    assert task.train_data.head(4)[1].tolist() == [0, 1, 0, 1]
    for some in ([0, 1, None, -1], ["no", "yes", float("nan"), -1]):
        data = {"train": (texts, some * 3), "validation": (texts, some[:2] * 6)}
        task = nc.HuggingFaceTask(model, data, processor=tokenizer)
        assert task.train_data.head(4)[1].tolist() == [0, 1, -100, -100]
    none = {"train": (texts, [None] * 12), "validation": (texts, labels)}
    task = nc.HuggingFaceTask(model, none, processor=tokenizer)
    assert set(task.train_data.head(12)[1].tolist()) == {-100}


def test_words_carry_their_tag_on_the_first_token(tokenizer: Any) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30, num_labels=3
    )
    rows = [{"tokens": ["good", "film-plot", "was"], "tags": [2, 1, 0]}, {"tokens": ["bad"], "tags": [1]}]
    task = nc.HuggingFaceTask(
        transformers.BertForTokenClassification(config), {"train": rows, "validation": rows}, processor=tokenizer
    )
    none = -100
    assert task.val_data.head(2)[1].tolist() == [[none, 2, 1, none, none, 0, none], [none, 1, *[none] * 5]]
    outputs = torch.zeros(2, 7, 3)
    outputs[..., 1] = 1  # Class 1 everywhere: right in two of four words.
    assert task.metric == "token_accuracy"
    assert task.evaluate(lambda inputs: outputs) == 0.5
    assert task.loss(outputs, task.val_data.head(2)[1]).item() == pytest.approx(np.log(2 + np.e) - 0.5)


def test_answers_become_spans_of_tokens(tokenizer: Any) -> None:
    import transformers

    context = "the film was good where the plot was poor"
    rows = [
        {"question": "where was it good", "context": context, "answers": {"text": ["the plot"], "answer_start": [24]}},
        {"question": "is it", "context": context, "answers": {"text": [], "answer_start": []}},
    ]
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    model = transformers.BertForQuestionAnswering(config)
    task = nc.HuggingFaceTask(model, {"train": rows, "validation": rows}, processor=tokenizer)
    inputs, targets = task.val_data.head(2)
    assert targets.tolist() == [[11, 12], [0, 0]]
    assert [WORDS[token] for token in inputs["input_ids"][0, 11:13]] == ["the", "plot"]
    assert task.predict(task.model)(inputs).shape == (2, task.max_length, 2)
    assert 0 <= task.evaluate(task.predict(task.model)) <= 1


def test_span_f1_takes_the_best_span_that_does_not_end_before_it_starts() -> None:
    outputs = torch.zeros(2, 6, 2)
    outputs[0, 1, 0], outputs[0, 3, 1] = 5, 5  # Tokens 1 to 3.
    outputs[1, 4, 0], outputs[1, 2, 1], outputs[1, 5, 1] = 5, 9, 5  # The end at 2 comes before 4.
    assert span_f1(outputs, torch.tensor([[2, 3], [4, 5]])) == pytest.approx((0.8 + 1) / 2)


def test_the_language_model_is_scored_on_the_next_token(tokenizer: Any) -> None:
    model, _ = make("llama")
    data = {name: [{"text": text} for text in sentences(count)[0]] for name, count in (("train", 8), ("validation", 4))}
    task = nc.HuggingFaceTask(model, data, processor=tokenizer)
    inputs, targets = task.val_data.head(4)
    assert (task.metric, task.mode) == ("perplexity", "min")
    assert torch.equal(targets == -100, inputs["attention_mask"] == 0)
    with torch.no_grad():
        loss = model(**inputs, labels=targets).loss
    outputs = task.predict(task.model)(inputs)
    assert perplexity(outputs, targets) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert model.config.use_cache
    assert not task.model.config.use_cache


def test_speech_is_scored_by_its_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance([], [1, 2]) == 2
    frames = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2], [0, 0, 3, 3, 0]]), 4).float() * 20
    texts = torch.tensor([[1, 1, 2], [2, -100, -100]])  # Decoded: 1 1 2 and 3.
    assert TokenErrorRate(0)(frames, texts) == 0.25
    assert CtcLoss(0)(frames[:1], texts[:1]).item() < 1e-3 < CtcLoss(0)(frames[1:], texts[1:]).item()


def test_recordings_and_transcripts_are_padded() -> None:
    import transformers
    from tokenizers import Tokenizer, models
    from transformer_families import FAMILIES

    letters = {"<pad>": 0, "a": 1, "b": 2, "<unk>": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [], unk_token="<unk>")), pad_token="<pad>", unk_token="<unk>"
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    config = transformers.Wav2Vec2Config(**{**FAMILIES["wav2vec2"][1], "vocab_size": 4, "pad_token_id": 0})
    waves = [{"array": np.sin(np.arange(n) / 9), "sampling_rate": 8000} for n in (1500, 2000)]
    data = {"train": (waves, ["ab", "b"]), "validation": (waves, ["b", "abba"])}
    task = nc.HuggingFaceTask(transformers.Wav2Vec2ForCTC(config), data, processor=processor)
    inputs, targets = task.val_data.head(2)
    assert (task.kind, task.metric, task.mode) == ("speech_recognition", "token_error_rate", "min")
    assert targets.tolist() == [[2, -100, -100, -100], [1, 2, 2, 1]]
    assert inputs["attention_mask"].sum(1).tolist() == [1500, 2000]
    assert task.loss(task.predict(task.model)(inputs), targets).isfinite()
    assert task.evaluate(task.predict(task.model)) > 0
    waves[0]["sampling_rate"] = 16000
    with pytest.raises(ConfigError, match="16000 samples a second, the model takes 8000"):
        nc.HuggingFaceTask(transformers.Wav2Vec2ForCTC(config), data, processor=processor)


def test_images_and_encoded_data_are_taken(tmp_path: Any) -> None:
    import transformers

    model, inputs = make("vit")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    images = [np.full((20, 24, 3), value, np.uint8) for value in (0, 255, 90)]
    data = {"train": (images, [0, 1, 2]), "validation": (images, [0, 1, 2])}
    task = nc.HuggingFaceTask(model, data, processor=processor)
    pixels, _ = task.train_data.head(3)
    assert pixels["pixel_values"].shape == (3, 3, 32, 32)
    assert pixels["pixel_values"][:2].flatten(1).mean(1).tolist() == [-1, 1]
    encoded = (inputs["pixel_values"], torch.tensor([0, 2]))
    task = nc.HuggingFaceTask(model, {"train": encoded, "validation": encoded})
    assert task.input_names == ("pixel_values",)
    assert task.processor is None
    rows = [{"pixel_values": inputs["pixel_values"][i], "labels": i} for i in range(2)]
    task = nc.HuggingFaceTask(model, {"train": rows, "validation": rows})
    assert task.train_data.head(2)[1].tolist() == [0, 1]


def test_a_config_without_names_of_classes_gets_the_usual_ones() -> None:
    import transformers

    sizes = {
        "image_size": 32,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
    }
    config = transformers.PvtConfig(num_labels=3, **sizes)
    assert config.label2id is None
    data = {"pixel_values": torch.randn(4, 3, 32, 32)}, torch.tensor([0, 1, 2, 1])
    model = transformers.PvtForImageClassification(config).eval()
    task = nc.HuggingFaceTask(model, {"train": data, "validation": data}, kind="image_classification")
    assert task.spec.prunable_names


def test_a_folder_tells_kind_and_tokenizer_and_gets_a_head_for_the_classes(tokenizer: Any, tmp_path: Any) -> None:
    model, _ = make("bert", num_labels=2)
    model.save_pretrained(tmp_path / "two")
    model.bert.save_pretrained(tmp_path / "none")
    for folder in ("two", "none"):
        tokenizer.save_pretrained(tmp_path / folder)
    task = nc.HuggingFaceTask(tmp_path / "two", splits())
    assert task.processor.vocab_size == len(WORDS)
    assert torch.equal(task.model.classifier.weight, model.classifier.weight)
    texts, _ = sentences(9)
    three = {"train": (texts, ["bad", "fair", "good"] * 3), "validation": (texts[:2], ["good", "bad"])}
    task = nc.HuggingFaceTask(tmp_path / "none", three, kind="text_classification")
    assert task.model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert task.val_data.head(2)[1].tolist() == [2, 0]
    with pytest.raises(ConfigError, match="kind: a BertModel does not tell it"):
        nc.HuggingFaceTask(tmp_path / "none", three)
    with pytest.raises(ConfigError, match="head has 2 classes, the data has 3"):
        nc.HuggingFaceTask(model, three, processor=tokenizer)
    with pytest.raises(ConfigError, match="label: 'mood' is unknown; allowed: 'bad', 'fair', 'good'"):
        nc.HuggingFaceTask(tmp_path / "none", {**three, "test": (texts[:1], ["mood"])}, kind="text_classification")


def test_a_metric_of_the_evaluate_library_is_found_by_name(tokenizer: Any, tmp_path: Any) -> None:
    pytest.importorskip("evaluate")
    script = tmp_path / "hits" / "hits.py"
    script.parent.mkdir()
    script.write_text(
        "import datasets\nimport evaluate\n"
        "class Hits(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        numbers = datasets.Value('int64')\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features("
        "{'predictions': numbers, 'references': numbers}))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'hits': float(sum(p == r for p, r in zip(predictions, references)))}\n"
    )
    model, _ = make("bert", num_labels=2)
    task = nc.HuggingFaceTask(model, splits(8, 6), processor=tokenizer, metric=str(script))
    accuracy = nc.HuggingFaceTask(model, splits(8, 6), processor=tokenizer)
    assert task.metric == "hits"
    assert task.evaluate(task.predict(model)) == pytest.approx(6 * accuracy.evaluate(task.predict(model)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "translation"}, "kind: 'translation' is unknown"),
        ({"dataset": {"train": ([], [])}}, "the split 'validation' is missing"),
        ({"dataset": [1, 2]}, "dataset: a list was given"),
        ({"inputs": "sentence", "dataset": {"train": [{"text": "a", "label": 0}] * 2, "validation": []}}, "'sentence'"),
        ({"dataset": {"train": (["a"], [0, 1]), "validation": (["a"], [0])}}, "1 inputs were given with 2 labels"),
        ({"processor": None}, "processor: none was given"),
        ({"model": torch.nn.Linear(2, 2), "kind": "text_classification"}, "not a model of transformers"),
    ],
)
def test_bad_arguments_are_refused(tokenizer: Any, changes: dict[str, Any], says: str) -> None:
    model, _ = make("bert", num_labels=2)
    arguments = {"model": model, "dataset": splits(), "processor": tokenizer, **changes}
    with pytest.raises(ConfigError, match=says):
        nc.HuggingFaceTask(**arguments)


@pytest.mark.slow
def test_a_joint_config_runs_through_all_stages_and_is_saved(text_task: nc.HuggingFaceTask, tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    from ray_nascomp.deployment.runtime import make_session, run_session

    task = text_task.elastic()
    blocks = [f"bert.encoder.layer.{i}" for i in range(3)]
    config = {
        "architecture": {
            blocks[0]: {"heads": 3, "width": 72},
            blocks[1]: {"keep": False, "heads": 1, "width": 24},
            blocks[2]: {"keep": True, "heads": 4, "width": 96},
        },
        "prune": {"method": "l1_norm", "sparsity": {f"{blocks[2]}.attention.self": 0.25}, "round_to": 1},
    }
    step = nc.compress(task, config, 0)
    assert step.metrics["feasible"], step.metrics["reason"]
    network = step.run.candidate.network
    assert network.bert.encoder.layer[1].attention.self.query.out_features == 3 * 16
    assert step.metrics["params"] == sum(parameter.numel() for parameter in network.parameters())
    inputs = task.val_data.head(4)[0]
    expected = task.predict(network)(inputs)
    found = run_session(make_session(step.artifact.content), inputs, task.input_names)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    task.save_pretrained(network, tmp_path, {"accuracy": step.metrics["accuracy"]})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(task.predict(loaded)(inputs), expected, rtol=0, atol=1e-5)
