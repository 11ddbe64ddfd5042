"""What fewer rows of an embedding cost before anything is trained: rare tokens merged, or spelled.

python rows.py --data folder-of-sentence-polarity --output case_output --seed 0

The original of the language study is judged on the validation data with rows for those tokens alone that occur so
often in the training sentences. No test sample is looked at.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from pathlib import Path

from baseline import Inputs, Split
from language import CASE, LENGTH, merged, minilm
from study import Study
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.distill import distillation_loss
from ray_nascomp.compression.vocabulary import trim_embedding, trim_vocabulary

LEAST_COUNTS = range(1, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the data are")
    parser.add_argument("--output", type=Path, default=Path("case_output"), help="folder of the studies")
    parser.add_argument("--seed", type=int, default=0, help="the study's seed")
    parser.add_argument("--quick", action="store_true", help="of a quick study")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    rows = judged(Study(CASE, arguments.data, arguments.output, arguments.seed, quick=arguments.quick))
    text = json.dumps({"case": CASE.name, "seed": arguments.seed, "forms": rows}, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


def judged(study: Study) -> list[dict[str, object]]:
    """Rows, accuracy and divergence from the original of each form, on the validation data."""
    original, splits = study.original, study.splits
    inputs, targets = splits.val
    known = outputs_of(original, splits.val)

    def row(form: str, least: int, network: nn.Module, inputs: Inputs) -> dict[str, object]:
        found = outputs_of(network, (inputs, targets))
        rows = max(network.bert.embeddings.word_embeddings.parameters(), key=len)
        return {
            "form": form,
            "least_count": least,
            "rows": len(rows),
            "accuracy": round(float((found.argmax(-1) == targets).double().mean()), 4),
            "divergence": round(distillation_loss(found.double(), known.double(), targets).item(), 5),
        }

    rows = [row("whole", 0, original, inputs)]
    for least in LEAST_COUNTS:
        rows.append(row("merged", least, merged(original, splits, least), inputs))
        rows.append(row("spelled", least, *spelled(study, least)))
    return rows


def spelled(study: Study, least: int) -> tuple[nn.Module, Inputs]:
    """The original with a vocabulary for frequent words, and the validation sentences in that."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    known, lines = (
        tokenizer.batch_decode(part[0]["input_ids"], skip_special_tokens=True)
        for part in (study.splits.train, study.splits.val)
    )
    counts = Counter(word for line in known for word in line.split())
    trimmed = trim_vocabulary(tokenizer, [word for word, count in counts.items() if count >= least])
    network = copy.deepcopy(study.original)
    trim_embedding(network, trimmed.kept)
    tokens = trimmed.tokenizer(lines, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return network, {key: tokens[key] for key in study.splits.val[0]}


def outputs_of(network: nn.Module, samples: Split) -> Tensor:
    """A network's logits."""
    task = nc.HuggingFaceTask(network, {"train": samples, "validation": samples}, kind="text_classification")
    outputs, _ = task.outputs(task.predict(task.model), task.val_data)
    return outputs


if __name__ == "__main__":
    main()
