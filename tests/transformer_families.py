"""Small models of HuggingFace's families, made from their configs, and inputs that they run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers")

_BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}
_T5 = {
    "vocab_size": 100,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
_WHISPER = {
    "vocab_size": 100, "num_mel_bins": 20, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_source_positions": 50, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_WAV2VEC2 = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32, "num_labels": 3,
}  # fmt: skip

# Family -> config class, its arguments, model class, kind of input.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert": ("BertConfig", {**_BERT, "num_labels": 3}, "BertForSequenceClassification", "text"),
    "roberta": ("RobertaConfig", {**_BERT, "num_labels": 3}, "RobertaForSequenceClassification", "text"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "vocab_size": 100, "num_labels": 3},
        "DistilBertForSequenceClassification",
        "text",
    ),
    "vit": (
        "ViTConfig",
        {**_BERT, "image_size": 32, "patch_size": 8, "num_labels": 3},
        "ViTForImageClassification",
        "image",
    ),
    "wav2vec2": ("Wav2Vec2Config", _WAV2VEC2, "Wav2Vec2ForSequenceClassification", "wave"),
    "whisper": ("WhisperConfig", _WHISPER, "WhisperForConditionalGeneration", "mel"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "vocab_size": 100, "n_positions": 64},
        "GPT2LMHeadModel",
        "text",
    ),
    "t5": ("T5Config", _T5, "T5ForConditionalGeneration", "pair"),
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM", "text"),
    "mistral": ("MistralConfig", _LLAMA, "MistralForCausalLM", "text"),
}


def make(family: str, attention: str = "eager", seed: int = 0, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with weights large enough that each head and neuron matters, and a batch of two inputs."""
    import transformers

    config_class, arguments, model_class, kind = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**arguments, "attn_implementation": attention, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 100, (2, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    inputs: dict[str, Any] = {
        "text": {"input_ids": tokens, "attention_mask": mask},
        "pair": {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens[:, :7]},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)},
        "wave": {"input_values": torch.randn(2, 2000, generator=generator)},
        "mel": {
            "input_features": torch.randn(2, 20, 100, generator=generator),
            "decoder_input_ids": tokens[:, :7],
        },
    }[kind]
    return model, inputs


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def whole(architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture with everything kept."""
    return {
        block: {key: True if key == "keep" else max(domain.categories) for key, domain in dimensions.items()}
        for block, dimensions in architecture.items()
    }
