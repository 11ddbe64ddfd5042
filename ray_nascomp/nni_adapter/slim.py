"""NNI's SlimPruner, mended: parameters may be aligned to the mask of a normalisation."""

from __future__ import annotations

from typing import Any

from nni.compression import pruning
from nni.compression.pruning.tools import generate_sparsity
from torch import Tensor


class AlignedSlimPruner(pruning.SlimPruner):
    """A slim pruner whose followers lose the channels that their normalisation loses.

    NNI reduces the mask that it aligns to by `mask.sum(dims)` over all other dimensions; a
    normalisation's mask has no other, and torch sums over everything where `dims` is empty.
    """

    def _generate_sparsity(self, metrics: Any) -> dict[str, dict[str, Tensor]]:
        leaders: dict[str, dict[str, Any]] = {}
        followers: list[tuple[str, str, Any]] = []
        for module, targets in self._target_spaces.items():
            for target, space in targets.items():
                if space.align is None:
                    leaders.setdefault(module, {})[target] = space
                elif space.target is not None:
                    followers.append((module, target, space))
        masks: dict[str, dict[str, Tensor]] = generate_sparsity(metrics, leaders)
        for module, target, space in followers:
            leader = masks[space.align["module_name"] or module][space.align["target_name"]]
            alive = leader.reshape(leader.shape[0], -1).any(dim=1).float()
            masks[module][target] = alive.reshape(-1, *[1] * (space.target.dim() - 1))
        return masks
