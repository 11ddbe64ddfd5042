"""What a search has found: tables, fronts, plots, a report, and the chosen model."""

from ray_nascomp.results.live import FrontReporter
from ray_nascomp.results.results import Results
from ray_nascomp.results.selected import SelectedModel

__all__ = ["FrontReporter", "Results", "SelectedModel"]
