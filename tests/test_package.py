"""The package as its users get it: what importing it loads, its public names, and what its wheel holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "ray_nascomp": ROOT / "ray_nascomp",
    "ray_nascomp/searchers": ROOT / "searchers",
    "ray_nascomp/schedulers": ROOT / "schedulers",
}
HEAVY = {
    "botorch",
    "gpytorch",
    "nni",
    "onnx",
    "onnxruntime",
    "plotly",
    "pymoo",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
}
PUBLIC = {
    "ray_nascomp": {
        "CompressionPlan",
        "ConfigError",
        "Constraint",
        "CostModel",
        "Goal",
        "InfeasibleError",
        "ModelSpec",
        "Objective",
        "Observation",
        "Results",
        "Task",
        "bits",
        "compress",
        "compress_steps",
        "compression_space",
        "compression_trainable",
        "rank",
        "recorded",
        "restore",
        "sparsity",
        "time_limited",
        "train_supernet",
        "when",
    },
    "ray_nascomp.searchers": {"BayesianSearch", "EvolutionarySearch", "GoalSearcher", "GreedySearch", "HybridSearch"},
    "ray_nascomp.schedulers": {"FeasibilityScheduler", "ParetoASHAScheduler"},
}


def loaded_by(statement: str, folder: Path) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    # Elsewhere than in the repository, where the folder ray_nascomp hides the installed package.
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", PUBLIC)
def test_importing_loads_no_heavy_library(module: str, tmp_path: Path) -> None:
    loaded = loaded_by(f"import {module}", tmp_path)
    assert "ray_nascomp" in loaded
    assert loaded & HEAVY == set()


def test_importing_the_package_alone_does_not_load_ray(tmp_path: Path) -> None:
    assert "ray" not in loaded_by("import ray_nascomp", tmp_path)


def test_listing_names_loads_none_of_them(tmp_path: Path) -> None:
    loaded = loaded_by("import ray_nascomp\nassert 'Task' in dir(ray_nascomp)", tmp_path)
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_listed_and_there(module: str) -> None:
    package = import_module(module)
    assert PUBLIC[module] <= set(package.__all__)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert missing == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    package = import_module("ray_nascomp")
    with pytest.raises(AttributeError, match="no attribute 'Prunner'"):
        _ = package.Prunner


def test_importing_registers_with_tune_by_name() -> None:
    from ray.tune.schedulers import SCHEDULER_IMPORT
    from ray.tune.search import SEARCH_ALG_IMPORT

    searchers = import_module("ray_nascomp.searchers")
    schedulers = import_module("ray_nascomp.schedulers")
    assert SEARCH_ALG_IMPORT["nascomp_evolutionary"]() is searchers.EvolutionarySearch
    assert SCHEDULER_IMPORT["pareto_asha"] is schedulers.ParetoASHAScheduler


@pytest.mark.slow
def test_wheel_holds_every_module_and_template_under_one_name(tmp_path: Path) -> None:
    # A copy, because setuptools leaves build/ behind, and takes deleted modules from it the next time.
    source = tmp_path / "source"
    for name in ("ray_nascomp", "searchers", "schedulers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)

    (wheel,) = tmp_path.glob("ray_nascomp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", ".j2"} or path.parent.name == "assets"
    }
    assert held == wanted | {"ray_nascomp/py.typed"}
    assert {
        "ray_nascomp/searchers/base.py",
        "ray_nascomp/schedulers/rungs.py",
        "ray_nascomp/results/report.html.j2",
    } <= held
    assert "LICENSE" in metadata
