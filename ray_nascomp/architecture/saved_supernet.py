"""A supernet on disk, without pickle, so that it is trained once: safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError

_WEIGHTS_FILE = "supernet.safetensors"
_MANIFEST_FILE = "supernet.json"


@dataclass(frozen=True)
class SavedSupernet:
    """What a folder holds.

    Attributes:
        weights: The network's state.
        ranking: What the builder kept first while it was trained; empty where it has no order of its own.
    """

    weights: dict[str, Tensor]
    ranking: dict[str, list[int]]


def save_supernet(
    folder: Path,
    network: nn.Module,
    settings: Mapping[str, Any],
    losses: list[tuple[float, float]],
    ranking: Mapping[str, list[int]],
) -> None:
    """Writes a supernet; the manifest comes last, so that a folder with one is whole.

    Args:
        folder: Where the files go.
        network: The trained network.
        settings: What it was trained from and how.
        losses: Each epoch's mean loss of the largest and of the smallest sub-network.
        ranking: The builder's order of heads and neurons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / _WEIGHTS_FILE)
    manifest = {"settings": settings, "losses": losses, "ranking": ranking}
    (folder / _MANIFEST_FILE).write_text(json.dumps(manifest, default=str) + "\n")


def load_supernet(folder: Path, settings: Mapping[str, Any]) -> SavedSupernet | None:
    """The supernet of a folder; None where there is none yet.

    Raises:
        ConfigError: If the folder holds one of another task or of other settings, or a damaged one.
    """
    path = folder / _MANIFEST_FILE
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        weights = load_file(folder / _WEIGHTS_FILE)
        known, ranking = manifest["settings"], manifest["ranking"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"folder: the supernet in {folder} cannot be read: {error}") from error
    wanted = json.loads(json.dumps(settings, default=str))
    changed = [name for name in wanted if known.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"folder: {folder} holds a supernet with another {changed[0]}; give another folder, or delete this one"
        )
    return SavedSupernet(weights, ranking)
