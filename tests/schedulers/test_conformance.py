from __future__ import annotations

import pytest
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from ray_nascomp.schedulers import CompressionPBTScheduler, FeasibilityScheduler, ParetoASHAScheduler
from ray_nascomp.testing.schedulers import SchedulerConformance

pytestmark = pytest.mark.usefixtures("ray_session")


class TestParetoASHA(SchedulerConformance):
    def make_scheduler(self, goal, max_t):
        return ParetoASHAScheduler(goal, max_t=max_t)


class TestParetoASHAWithKnownCosts(SchedulerConformance):
    def make_scheduler(self, goal, max_t):
        return ParetoASHAScheduler(goal, max_t=max_t, grace_period=2, reduction_factor=2, cost_model=dict)


class TestFeasibility(SchedulerConformance):
    def make_scheduler(self, goal, max_t):
        return FeasibilityScheduler(goal, max_t)


class TestFeasibilityOverParetoASHA(SchedulerConformance):
    def make_scheduler(self, goal, max_t):
        return FeasibilityScheduler(goal, max_t, ParetoASHAScheduler(goal, max_t=max_t))


class TestCompressionPBT(SchedulerConformance):
    def make_scheduler(self, goal, max_t):
        return CompressionPBTScheduler(goal, {"end": tune.uniform(0.5, 1.0), "size": tune.uniform(1.0, 9.0)})


class TestTunesOwnFIFO(SchedulerConformance):
    """The suite asks nothing that Tune's plainest scheduler does not do."""

    def make_scheduler(self, goal, max_t):
        return FIFOScheduler()
