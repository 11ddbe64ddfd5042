"""What a search has found: tables, fronts, plots, a report, and the chosen model."""

from ray_nascomp.results.live import FrontReporter
from ray_nascomp.results.results import Results
from ray_nascomp.results.selected import SelectedModel
from ray_nascomp.results.stopper import HypervolumeStopper

__all__ = ["FrontReporter", "HypervolumeStopper", "Results", "SelectedModel"]
