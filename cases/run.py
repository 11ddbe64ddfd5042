"""Case studies: a network is trained, its smaller forms are searched, the best is judged on unseen data.

python run.py speech --data spoken_digits.npz
python run.py image --data folder-of-fashion-mnist
python run.py language --data folder-of-sentence-polarity
python run.py dates

What is finished is kept in the output folder and not done again; a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import compare, judge, timed, timed_twice
from study import Study

NEED_DATA = ("speech", "speech_transformer", "image", "language")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=(*NEED_DATA, "dates"))
    parser.add_argument("--data", type=Path, default=Path(), help="where the data are; dates need none")
    parser.add_argument("--output", type=Path, default=Path("case_output"), help="folder (default: case_output)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, one study each (default: 0)")
    parser.add_argument("--cores", type=int, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--trials", type=int, help="trials of each search instead of the case's own number")
    parser.add_argument("--quick", action="store_true", help="a small study, to see that all works")
    parser.add_argument("--time-again", action="store_true", help="times the files of a finished study once more")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="what one would do instead, too")
    extent.add_argument("--searches", action="store_true", help="the joint search against others, and no more")
    arguments = parser.parse_args()
    if arguments.case in NEED_DATA and arguments.data == Path():
        parser.error(f"--data: {arguments.case} needs data; docs/cases.md says where they come from")
    if not arguments.data.exists():
        parser.error(f"--data: {arguments.data} is not there; docs/cases.md says where the data come from")
    if arguments.trials is not None and arguments.trials < 1:
        parser.error(f"--trials: {arguments.trials} was given, 1 or more are allowed")
    case = importlib.import_module(arguments.case).CASE
    for seed in arguments.seeds:
        study = Study(case, arguments.data, arguments.output, seed, arguments.cores, arguments.quick)
        if arguments.trials is not None:
            study.budget = replace(study.budget, trials=arguments.trials)
        if arguments.searches:
            from rivals import compare_searches

            print(f"hypervolume: {compare_searches(study)['hypervolume']}", flush=True)
            print(f"figures {study.folder / 'searches.json'}", flush=True)
            continue
        record = carry_out(study)
        if arguments.full:
            from alternatives import carry_out_alternatives

            record = carry_out_alternatives(study)
        if arguments.time_again:
            record = time_again(study)
        show(record)
        print(f"figures {study.folder / 'result.json'}\nreport  {study.folder / 'report.html'}", flush=True)


def carry_out(study: Study) -> dict[str, Any]:
    """The study to its end; the test set is looked at once, then the figures stand."""
    target = study.folder / "result.json"
    if target.exists():
        return json.loads(target.read_text())
    start = time.monotonic()
    network = study.original
    say(start, f"an original of {sum(parameter.numel() for parameter in network.parameters()):,} parameters")
    results = study.joint_search()
    results.report(study.folder / "report.html")
    say(start, f"{results}")
    name, metrics = study.choose(results)
    say(start, f"chosen: {name}, {metrics['accuracy']:.4f} of the validation data")
    whole = study.whole
    original = judge(whole.content, study.splits.test, whole.metrics)
    chosen = judge((study.folder / name / "model.onnx").read_bytes(), study.test, metrics)
    study.keep("original", original.content)
    study.keep("ray-nascomp", chosen.content)
    record = {
        "case": study.case.name,
        "seed": study.seed,
        "test_samples": len(study.splits.test[1]),
        "trials": len(results),
        "config": json.loads((study.folder / name / "manifest.json").read_text())["config"],
        "validation": {"original": whole.metrics["accuracy"], "chosen": metrics["accuracy"]},
        "original": {**original.figures, **timed_twice(original.content, network, study.splits.test)},
        "models": {"ray-nascomp": compare(original, chosen, study.test)},
    }
    target.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return record


def time_again(study: Study) -> dict[str, Any]:
    """Times all files of a finished study once more, as on a machine that is quieter; nothing else is measured."""
    target = study.folder / "result.json"
    record = json.loads(target.read_text())
    original = study.kept("original")
    record["original"].update(timed_twice(original, study.original, study.splits.test))
    for name, figures in record["models"].items():
        figures.update(timed(original, study.kept(name), study.test))
    target.write_text(json.dumps(record, indent=1) + "\n")
    return record


def say(start: float, text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)


def show(record: dict[str, Any]) -> None:
    """The figures that matter, on the terminal."""
    original = record["original"]
    print(f"original: {original['accuracy']:.2%}, {original['params']:,} parameters, {original['bytes']:,} bytes")
    for name, figures in record["models"].items():
        print(
            f"{name}: {figures['accuracy']:.2%}, {1 - figures['params_share']:.1%} fewer parameters, "
            f"{1 - figures['bytes_share']:.1%} fewer bytes, {figures['speedup_batch1_threads1']:.1f}x at batch 1"
        )


if __name__ == "__main__":
    main()
