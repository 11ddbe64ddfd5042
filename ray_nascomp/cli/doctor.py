"""`ray-nascomp doctor`: what is installed, and what of it works on this machine."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from ray_nascomp.cli.output import as_json_option, print_json, print_table, working

_NEEDED = (
    "ray-nascomp", "ray", "torch", "nni", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "moocore", "numpy",
    "pandas", "scipy", "plotly", "safetensors",
)  # fmt: skip
_EXTRAS = {
    "botorch": "bayesian",
    "gpytorch": "bayesian",
    "optuna": "optuna",
    "scikit-learn": "importance",
    "transformers": "huggingface",
    "datasets": "huggingface",
}
_FAST_INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@click.command()
@as_json_option
def doctor(as_json: bool) -> None:
    """Show versions, and try what a search needs: export, integers, a Ray worker.

    Ends with exit code 1 if something that is needed is missing or broken.

    \b
    Examples:
      ray-nascomp doctor
      ray-nascomp doctor --json > environment.json
    """
    versions = {name: _version(name) for name in (*_NEEDED, *_EXTRAS)}
    checks: dict[str, Callable[[], str]] = {
        "compression": _try_compression,
        "ray": _try_ray,
    }
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        with working(f"trying {name}"):
            try:
                found[name] = {"works": True, "detail": check()}
            except Exception as error:
                found[name] = {"works": False, "detail": f"{type(error).__name__}: {error}"}
    machine = _machine()
    is_well = all(versions[name] for name in _NEEDED) and all(entry["works"] for entry in found.values())
    if as_json:
        print_json({"machine": machine, "versions": versions, "checks": found, "works": is_well})
    else:
        print_table(("machine", ""), machine.items())
        click.echo()
        print_table(
            ("package", "version"),
            [
                (
                    name,
                    number
                    or (f"missing; pip install 'ray-nascomp[{_EXTRAS[name]}]'" if name in _EXTRAS else "MISSING"),
                )
                for name, number in versions.items()
            ],
        )
        click.echo()
        print_table(
            ("check", "", ""), [(n, "works" if e["works"] else "BROKEN", e["detail"]) for n, e in found.items()]
        )
    sys.exit(0 if is_well else 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    fast = [flag for flag in _FAST_INTEGERS if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores,
        "integer instructions": ", ".join(fast) or "none that this program knows: int8 gains less",
        "accelerator": _accelerator(),
    }


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "unknown"
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "none"


def _try_compression() -> str:
    """Prunes, quantizes and exports a tiny network, and runs the file."""
    import torch
    from torch import nn

    import ray_nascomp as nc

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        inputs = torch.randn(64, 16)
    data = (inputs, inputs[:, :4].argmax(1))
    config = {"prune": {"sparsity": 0.5}, "quantize": {"bits": 8}}
    metrics = nc.compress(nc.Task(network, data, data), config, epochs=1).metrics
    if not metrics["feasible"] or metrics["export_error"] > 0.1:
        raise RuntimeError(f"the exported file is wrong: {metrics}")
    return f"pruned, quantized, exported; {metrics['size_ratio']:.1f}x smaller, error {metrics['export_error']:.1e}"


def _try_ray() -> str:
    """Starts a local Ray and runs a function in a worker."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        process = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
    finally:
        if is_ours:
            ray.shutdown()
    return f"a worker answered, process {process}"
