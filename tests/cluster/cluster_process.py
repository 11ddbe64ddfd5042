"""A search on a cluster of three nodes, of which one goes and another comes: prints what happened as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")

import ray
from ray import tune
from ray.cluster_utils import Cluster

import ray_nascomp as nc
from ray_nascomp.deployment.elsewhere import run_elsewhere
from ray_nascomp.recorded import recorded
from ray_nascomp.searchers import EvolutionarySearch

GOAL = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])
SPACE = {"width": tune.uniform(0, 1), "depth": tune.randint(1, 9)}
STEPS = 3
TRIALS = 24


def where():
    """A measurement: the node and the span of time that it had for itself."""
    start = time.time()
    time.sleep(0.05)
    return ray.get_runtime_context().get_node_id(), start, time.time()


class Wide(tune.Trainable):
    """Reports where each of its steps ran, with how many CPUs, and its measurement."""

    def setup(self, config, computed):
        self._computed, self._position = computed, 0

    def reset_config(self, new_config):
        self._position = 0
        return True

    def step(self):
        if self._position == STEPS:
            return {"__duplicate__": True, "done": True}
        time.sleep(0.2)
        self._wait_for_the_new_node()
        self._position += 1
        context = ray.get_runtime_context()
        node, start, end = run_elsewhere({"edge": 1}, where)
        entry = {
            "config": self.config,
            "step": self._position,
            "node": context.get_node_id(),
            "cpus": self.trial_resources.required_resources["CPU"],
            "measured": [node, start, end],
        }
        with open(self._computed, "a") as file:
            file.write(json.dumps(entry) + "\n")
        width, depth = self.config["width"], self.config["depth"]
        return {
            "error": (1 - width) ** 2 + 1 / depth,
            "size": width * depth,
            "node": context.get_node_id(),
            "final": self._position == STEPS,
        }

    def _wait_for_the_new_node(self):
        """However slow the machine, the others do not take all trials before the new node has one."""
        added, joined = (Path(self._computed).with_name(name) for name in ("added", "joined"))
        if added.exists() and added.read_text() == ray.get_runtime_context().get_node_id():
            joined.touch()
        end = time.time() + 60
        while added.exists() and not joined.exists() and time.time() < end:
            time.sleep(0.1)

    def save_checkpoint(self, checkpoint_dir):
        return {"position": self._position}

    def load_checkpoint(self, checkpoint):
        self._position = checkpoint["position"]


def resources(config):
    return tune.PlacementGroupFactory([{"CPU": 2 if config["width"] > 0.7 else 1}])


class NodesComeAndGo(tune.Callback):
    """Half way, a node dies that a trial has just begun to train on, and a new one joins."""

    def __init__(self, cluster, nodes, facts, folder):
        self._cluster, self._nodes, self._facts, self._folder, self._ended = cluster, nodes, facts, folder, 0

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._ended += 1

    def on_trial_result(self, iteration, trials, trial, result, **info):
        node = next((node for node in self._nodes if node.node_id == result["node"]), None)
        begun = node is not None and result["training_iteration"] == 1
        if begun and self._ended >= TRIALS // 3 and "removed" not in self._facts:
            self._facts["removed"] = node.node_id
            self._cluster.remove_node(node, allow_graceful=False)
            self._facts["added"] = self._cluster.add_node(num_cpus=2).node_id
            (self._folder / "added.new").write_text(self._facts["added"])
            (self._folder / "added.new").rename(self._folder / "added")


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    edge = cluster.add_node(num_cpus=2, resources={"edge": 1})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    facts = {"edge": edge.node_id}
    # The callback holds processes, which do not pickle: Tune's Tuner pickles what it is given.
    search = tune.run(
        tune.with_resources(tune.with_parameters(recorded(Wide), computed=str(folder / "computed")), resources),
        config=SPACE,
        num_samples=TRIALS,
        search_alg=EvolutionarySearch(GOAL, seed=1),
        storage_path=str(folder),
        name="run",
        verbose=0,
        max_failures=5,
        reuse_actors=True,
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        callbacks=[NodesComeAndGo(cluster, nodes, facts, folder)],
        raise_on_failed_trial=False,
    )
    facts["statuses"] = [trial.status for trial in search.trials]
    facts["configs"] = [trial.config for trial in search.trials]
    facts["last"] = [trial.last_result.get("training_iteration") for trial in search.trials]
    facts["nodes"] = [node["NodeID"] for node in ray.nodes()]
    facts["steps"] = [json.loads(line) for line in (folder / "computed").read_text().splitlines()]
    print("FACTS " + json.dumps(facts))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
