"""A speech classifier made smaller: Wav2Vec2, its architecture and its compression searched together.

python hf_speech.py                                          # from the hub
python hf_speech.py --model small --dataset spoken_digits.npz
python hf_speech.py --model small --dataset tones            # offline: low, middle and high tones

A file .npz holds `samples` (all recordings end to end), `offsets`, `digit` and `take`, as the Free
Spoken Digit Dataset in one file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hf_search import parser, search

import ray_nascomp as nc

RATE = 8000


def main() -> None:
    options = parser(__doc__, "facebook/wav2vec2-base", "google/speech_commands")
    arguments = options.parse_args()
    small = arguments.model == "small"
    data = arguments.dataset
    if data == "tones":
        data = tones()
    elif data.endswith(".npz"):
        data = spoken_digits(data)
    task = nc.HuggingFaceTask(
        small_wav2vec2() if small else arguments.model,
        data,
        kind="audio_classification",
        processor=extractor() if small else None,
        max_length=RATE // 2 if small else 16000,
    )
    task = task.finetune(num_train_epochs=arguments.tuning_epochs, learning_rate=1e-3 if small else 1e-4)
    search(task, arguments)


def small_wav2vec2() -> Any:
    """A small Wav2Vec2 for ten classes, untrained."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32, 32, 32),
        conv_stride=(5, 4, 4, 2),
        conv_kernel=(10, 8, 8, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        num_labels=10,
        mask_time_prob=0.0,
    )
    torch.manual_seed(0)
    return Wav2Vec2ForSequenceClassification(config)


def extractor() -> Any:
    """What makes every recording equally loud and long."""
    from transformers import Wav2Vec2FeatureExtractor

    return Wav2Vec2FeatureExtractor(sampling_rate=RATE)


def tones() -> dict[str, Any]:
    """Tones of three pitches in noise, a quarter to half a second long."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 240), ("validation", 90), ("test", 90)):
        labels = [i % 3 for i in range(count)]
        waves = [
            np.sin(2 * np.pi * rng.uniform(0.9, 1.1) * 300 * 2**label * np.arange(rng.integers(2000, 4000)) / RATE)
            for label in labels
        ]
        splits[name] = ([wave + 0.3 * rng.standard_normal(len(wave)) for wave in waves], labels)
    return splits


def spoken_digits(path: str) -> dict[str, Any]:
    """Recordings of digits; the first five takes of each speaker are the test set, the next five for validation."""
    with np.load(path) as file:
        samples, offsets = file["samples"].astype(np.float32) / 32768, file["offsets"]
        takes, digits = file["take"], file["digit"]
    chosen = {"test": takes < 5, "validation": (takes >= 5) & (takes < 10), "train": takes >= 10}
    return {
        name: (
            [samples[offsets[i] : offsets[i + 1]] for i in np.flatnonzero(rows)],
            [int(digits[i]) for i in np.flatnonzero(rows)],
        )
        for name, rows in chosen.items()
    }


if __name__ == "__main__":
    main()
