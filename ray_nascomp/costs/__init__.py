"""Costs that follow from a plan and a model spec alone: exact, thousands a second, before any trial runs."""

from ray_nascomp.costs.cost_model import CostModel, LayerCost

__all__ = ["CostModel", "LayerCost"]
