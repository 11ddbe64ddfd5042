from __future__ import annotations

import numpy as np
import pytest

from ray_nascomp.model_spec import GroupSpec, LayerSpec, ModelSpec
from ray_nascomp.searchers import GNNPredictorSearch
from ray_nascomp.searchers.graph_network import GraphEnsemble
from ray_nascomp.searchers.layer_graph import LayerGraph
from ray_nascomp.space import Space, sparsity
from ray_nascomp.space import bits as choose_bits
from ray_nascomp.testing.problems import mixed, ordinal
from ray_nascomp.testing.searchers import run_search

SPEC = ModelSpec(
    layers=(
        LayerSpec("stem", "conv", (8, 3, 3, 3), False, out_group="stem"),
        LayerSpec("branch", "conv", (4, 8, 3, 3), False, out_group="branch", in_groups=(("stem", 1),)),
        LayerSpec("merge", "conv", (8, 4, 3, 3), False, out_group="stem", in_groups=(("branch", 1),)),
        LayerSpec("head", "linear", (10, 8), True, in_groups=(("stem", 1),)),
    ),
    groups=(GroupSpec("stem", 8, ("stem", "merge"), True), GroupSpec("branch", 4, ("branch",), True)),
)
SPACE = Space(
    {
        "prune": {"sparsity": {"stem": sparsity(), "branch": sparsity()}},
        "quantize": {"bits": {name: choose_bits([4, 8, 32]) for name in ("stem", "branch", "merge", "head")}},
        "finetune": {"lr": 0.1, "warmup": choose_bits([1, 2, 3])},
    }
)


def test_layers_carry_their_group_and_bits_and_read_each_other():
    graph = LayerGraph.of(SPACE, SPEC)
    names = [d.name.removeprefix("prune/").removeprefix("quantize/") for d in SPACE.dimensions]
    nodes = [[names[i] for i in own] for own in graph.nodes]
    assert nodes[0] == ["sparsity/stem", "bits/stem"]
    assert nodes[2] == ["sparsity/stem", "bits/merge"]
    assert nodes[3] == ["bits/head"]
    assert nodes[4] == ["finetune/warmup"]
    near = graph.adjacency > 0
    # stem feeds branch and head, branch feeds merge, merge adds to stem's group and feeds branch and head.
    assert near[:4, :4].astype(int).tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]
    assert near[4].all()
    assert np.allclose(graph.adjacency.sum(axis=1), 1)


def test_the_ensemble_learns_and_knows_where_it_does_not():
    problem = ordinal(layers=6)
    space = Space(problem.space)
    rng = np.random.default_rng(0)
    configs = [space.sample(rng) for _ in range(260)]
    targets = np.array([[problem.evaluate(config)["accuracy"]] for config in configs])
    graph = LayerGraph.of(space, None)
    nodes, extra = graph.features(space, space.encode(configs)), np.zeros((260, 0))
    ensemble = GraphEnsemble(graph.adjacency, nodes.shape[2], 0, 1, rng)
    ensemble.fit(nodes[:160], extra[:160], targets[:160], 150, rng)
    mean, deviation = ensemble.predict(nodes[160:], extra[160:])
    errors = np.abs(mean - targets[160:])
    assert 1 - (errors**2).mean() / targets[160:].var() > 0.7
    assert np.abs(ensemble.predict(nodes[:160], extra[:160])[0] - targets[:160]).mean() < errors.mean()
    assert deviation.mean() > 0.2 * errors.mean()


@pytest.mark.slow
def test_a_constant_in_place_of_the_network_finds_less():
    class Constant(GNNPredictorSearch):
        def imagine(self, configs, known, unknown, draws):
            targets = self.metric_table(self.final_positions())
            mean = np.nanmean(targets[:, [self.goal.metrics.index(metric) for metric in unknown]], axis=0)
            return np.tile(mean, (draws, len(configs), 1))

    problem = mixed()

    def found(make, seed):
        results = run_search(make(problem.goal, problem.known, seed=seed), problem, 50)
        return problem.hypervolume([metrics for _, metrics in results])

    learnt, constant = ([found(make, seed) for seed in range(3)] for make in (GNNPredictorSearch, Constant))
    assert min(learnt) > max(constant)
