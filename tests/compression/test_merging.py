from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.merging import merge_embedding
from ray_nascomp.deployment.dense import usual_layout
from ray_nascomp.errors import ConfigError

transformers = pytest.importorskip("transformers")

TOKENS, WIDTH = 60, 16
KEPT = [0, 1, 2, *range(10, 40, 3)]
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(kind=transformers.BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(vocab_size=TOKENS, max_position_embeddings=12, **SHAPE))
    with torch.no_grad():  # Fresh embeddings of width 16 tell no texts apart.
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


def merged_bert() -> nn.Module:
    model = bert()
    merge_embedding(model, [*KEPT, 2])
    return model


def sentences(count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(3, TOKENS, (count, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.arange(count)[:, None] % 9 + 4).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.arange(count) % 2


def test_kept_tokens_are_read_as_before_and_others_as_the_most_similar_of_these():
    model, merged = bert(), merged_bert()
    weight = model.get_input_embeddings().weight
    embedding = merged.get_input_embeddings()
    assert embedding.table.weight.shape == (len(KEPT), WIDTH)
    assert torch.equal(embedding(torch.tensor(KEPT)), weight[KEPT])
    for token in set(range(TOKENS)) - set(KEPT):
        similarity = nn.functional.cosine_similarity(weight[token], weight[KEPT])
        assert torch.equal(embedding(torch.tensor(token)), weight[KEPT][similarity.argmax()])
    ids = torch.tensor(KEPT[:12])[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    assert embedding.table.padding_idx == 0


def test_of_equal_rows_each_kept_token_has_its_own():
    model = bert()
    with torch.no_grad():
        model.get_input_embeddings().weight[KEPT] = 1.0
    merge_embedding(model, torch.tensor([*KEPT, *KEPT]))
    assert model.get_input_embeddings().rows[KEPT].tolist() == list(range(len(KEPT)))


def test_a_merged_model_is_compressed_and_costs_what_was_foretold():
    data = sentences(64)
    original = nc.HuggingFaceTask(bert(), {"train": data, "validation": data}, kind="text_classification")
    task = nc.HuggingFaceTask(
        merged_bert(), {"train": data, "validation": data}, kind="text_classification", original=original
    )
    embedding = "bert.embeddings.word_embeddings.table"
    config = {
        "low_rank": {"rank": {embedding: 0.5}},
        "quantize": {"bits": {"*": 8, embedding: 4}},
    }
    metrics = nc.compress(task, config, epochs=0).metrics
    known = nc.CostModel(task)(config)
    assert metrics["params"] == known["params"]
    assert metrics["size_mb"] == pytest.approx(known["size_mb"], rel=0.02)
    assert metrics["divergence"] > 0


def test_of_a_large_model_what_tells_tokens_their_rows_is_counted():
    assert usual_layout(merged_bert()).shared_rows == 2 * TOKENS
    assert usual_layout(bert()).shared_rows == 0


def test_a_merged_model_is_copied_and_loaded():
    merged = merged_bert()
    other = copy.deepcopy(merged)
    other.load_state_dict(merged.state_dict())
    inputs, _ = sentences(4)
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize(
    ("model", "kept", "message"),
    [
        (lambda: nn.Linear(2, 2), [0], "Linear has no plain token embedding"),
        (merged_bert, [0], "BertForSequenceClassification has no plain token embedding"),
        (lambda: bert(transformers.BertForMaskedLM), [0], "BertForMaskedLM writes tokens"),
        (bert, [0, TOKENS], "tokens 0 to 60 were given, 0 to 59 are allowed"),
        (bert, [-1, 4], "tokens -1 to 4 were given"),
        (bert, [], "tokens none were given"),
        (bert, torch.ones(TOKENS, dtype=torch.bool), r"tokens of shape \(60,\) and torch.bool were given"),
    ],
)
def test_what_cannot_be_merged_is_refused(model, kept, message):
    with pytest.raises(ConfigError, match=f"vocabulary: .*{message}"):
        merge_embedding(model(), kept)
