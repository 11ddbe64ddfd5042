"""A run that starts from the weights of another whose structure contains its own.

A network pruned to a half starts from one pruned to a third: what goes further is decided on that
one's weights. Winners of population-based training hand on their weights so (Jaderberg et al.
2017, arXiv 1711.09846; progressive shrinking: Cai et al. 2020, arXiv 1908.09791).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.compression.fold import foldable_pairs
from ray_nascomp.compression.low_rank import Factorised
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.costs import CostModel
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline.candidate import Candidate, carry_out
from ray_nascomp.pipeline.checkpoint import read_saved
from ray_nascomp.pipeline.snapshot import Snapshot
from ray_nascomp.plan import CompressionPlan

if TYPE_CHECKING:
    from ray_nascomp.pipeline.run import CompressionRun


def continue_run(run: CompressionRun, folder: Path) -> None:
    """Makes the run's candidate from that of a saved run, and puts it at the same step.

    Args:
        run: A run that has taken no step.
        folder: The saved run.

    Raises:
        ConfigError: If the folder is not a saved run of this task, or its structure does not
            contain the run's.
        InfeasibleError: If the plan cannot be carried out.
    """
    manifest, tensors = read_saved(run.task, folder)
    if manifest["removed"] is None:
        raise ConfigError(f"{folder} holds the run of an infeasible plan; there is no network in it")
    before = run.costs.plan(manifest["config"])
    removed = {name: len(units) for name, units in manifest["removed"].items()}
    refused = refusal(run.costs, run.plan, before, removed, manifest["ranks"])
    if refused is not None:
        raise ConfigError(f"{folder} cannot be continued from: {refused}")
    candidate = Snapshot(tensors, manifest).candidate(run.task, before)
    _undo_preparation(candidate, run)
    stays = {name for name, rank in run.costs.ranks(run.plan).items() if manifest["ranks"].get(name) == rank}
    for name in [name for name in candidate.factors if name not in stays]:
        replace_module(candidate.network, name, _whole(candidate.network.get_submodule(name)))
        del candidate.factors[name]
    one_shot = replace(run.plan, prune=replace(run.plan.prune, schedule="one_shot"))
    candidate.plan = one_shot
    candidate.masks = {}
    for number, stage in enumerate(run.recipe.stages, start=1):
        if stage in ("prune", "low_rank"):
            carry_out(candidate, run.task, stage, run.costs, run.trainer, run.recipe.seed(number))
    candidate.plan = run.plan
    if not candidate.is_prepared:
        reestimate_batch_norm(candidate.network, run.task.calibration_batches())
    run.candidate = candidate
    run.steps_done = manifest["steps_done"]


def refusal(
    costs: CostModel,
    plan: CompressionPlan,
    before: CompressionPlan,
    removed: Mapping[str, int],
    ranks: Mapping[str, int],
) -> str | None:
    """Why a plan cannot go on from a candidate; None if it can.

    Args:
        costs: The task's cost model.
        plan: The plan.
        before: The candidate's plan.
        removed: Group name -> number of units that the candidate lacks.
        ranks: Layer name -> rank of the candidate's factors.

    Raises:
        InfeasibleError: If the plan cannot be carried out.
    """
    same = ("architecture", "stages", "order")
    for name in same:
        if getattr(plan, name) != getattr(before, name):
            return f"{name} is another"
    counts = costs.removed(plan)
    for name, count in removed.items():
        if count > counts.get(name, 0):
            return f"group {name!r} lacks {count} units already, {counts.get(name, 0)} are to go"
    wanted = costs.ranks(plan)
    for name, rank in ranks.items():
        if wanted.get(name, rank + 1) > rank:
            return f"layer {name!r} has a rank of {rank} already"
    if not before.prune.removes_units and not before.prune.is_identity:
        if plan.prune.method != before.prune.method:
            return f"its pruner is {before.prune.method!r}"
        if any(plan.prune.of(name) < before.prune.of(name) for name in {*before.prune.sparsity, *plan.prune.sparsity}):
            return "more of its weights are zero already"
    if plan.prune.method == "slim" and before.quantize.trains:
        return "slim needs normalisations, which training with integers has folded"
    return None


def _undo_preparation(candidate: Candidate, run: CompressionRun) -> None:
    """Takes smoothing back, which later stages do anew; what is folded stays so."""
    for name in candidate.smoothed:
        pair: Any = candidate.network.get_submodule(name)
        scale, layer = pair
        with torch.no_grad():
            layer.weight.mul_(scale.factor)
        replace_module(candidate.network, name, layer)
    if candidate.is_prepared:
        fresh = Candidate.start(run.task, replace(candidate.plan, stages={}))
        candidate.is_prepared = bool(foldable_pairs(fresh.network, run.task.example_inputs))
    candidate.smoothed, candidate.calibration = {}, {}


def _whole(layer: nn.Module) -> nn.Module:
    """The layer that factors stand for."""
    assert isinstance(layer, Factorised)
    weight = layer.dense_weight().detach()
    core: Any = next((factor for factor in layer if factor.weight.dim() > 2), layer[0])  # type: ignore[operator]
    made: Any
    with torch.device("meta"):
        if isinstance(core, nn.Embedding):
            made = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=core.padding_idx)
        elif weight.dim() == 2:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        else:
            geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            made = type(core)(
                weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=layer.bias is not None, **geometry
            )
    made.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.train(layer.training)
