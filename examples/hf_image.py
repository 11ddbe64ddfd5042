"""An image classifier made smaller: a vision transformer, its architecture and its compression searched together.

python hf_image.py                                           # from the hub
python hf_image.py --model small --dataset digits            # offline: a small one on scikit-learn's digits
"""

from __future__ import annotations

from typing import Any

from hf_search import parser, search

import ray_nascomp as nc


def main() -> None:
    options = parser(__doc__, "google/vit-base-patch16-224-in21k", "AI-Lab-Makerere/beans")
    arguments = options.parse_args()
    model, rate = (small_vit(), 2e-3) if arguments.model == "small" else (arguments.model, 5e-5)
    data = digits() if arguments.dataset == "digits" else arguments.dataset
    labels = None if arguments.dataset == "digits" else "labels"  # What the beans' classes are called.
    task = nc.HuggingFaceTask(model, data, kind="image_classification", labels=labels)
    task = task.finetune(num_train_epochs=arguments.tuning_epochs, learning_rate=rate)
    search(task, arguments)


def small_vit() -> Any:
    """A vision transformer for scans of 8 x 8 pixels, untrained."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config)


def digits() -> dict[str, Any]:
    """scikit-learn's scans of handwritten digits, as tensors that the model takes as they are."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 8.0 - 1.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:1200], "validation": order[1200:1500], "test": order[1500:]}
    return {name: (inputs[chosen], torch.tensor(labels)[chosen]) for name, chosen in rows.items()}


if __name__ == "__main__":
    main()
