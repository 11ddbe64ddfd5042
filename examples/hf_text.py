"""A sentence classifier made smaller: MiniLM, its architecture and its compression searched together.

python hf_text.py                                            # from the hub
python hf_text.py --model path/to/minilm --dataset path/to/sentence_polarity

The data set is a name on the hub, a folder of the `datasets` library, or a folder with one file
of sentences a class (.pos and .neg), one sentence a line.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hf_search import parser, search

import ray_nascomp as nc


def main() -> None:
    options = parser(__doc__, "sentence-transformers/all-MiniLM-L6-v2", "cornell-movie-review-data/rotten_tomatoes")
    options.add_argument("--samples", type=int, help="sentences to train on; all if absent")
    arguments = options.parse_args()
    data = read_sentences(Path(arguments.dataset), arguments.samples) or arguments.dataset
    # A pretrained encoder has no head yet: fine-tuning trains one with transformers' Trainer.
    task = nc.HuggingFaceTask(arguments.model, data, kind="text_classification", max_length=48)
    task = task.finetune(num_train_epochs=arguments.tuning_epochs, learning_rate=1e-4)
    search(task, arguments)


def read_sentences(folder: Path, samples: int | None) -> dict[str, Any] | None:
    """Splits of a folder with one file of sentences a class; None for anything else."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pos", ".neg"))
    if not files:
        return None
    rows = [
        (line, path.suffix)
        for path in files
        for line in path.read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    random.Random(0).shuffle(rows)
    held_out = min(len(rows) // 8, samples or len(rows))
    parts = {
        "test": rows[:held_out],
        "validation": rows[held_out : 2 * held_out],
        "train": rows[2 * held_out :][:samples],
    }
    return {name: ([text for text, _ in part], [label for _, label in part]) for name, part in parts.items()}


if __name__ == "__main__":
    main()
