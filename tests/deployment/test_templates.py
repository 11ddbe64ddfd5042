from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformer_families import make

import ray_nascomp as nc
from ray_nascomp.compression.attention import find_attentions, remove_heads
from ray_nascomp.compression.smooth import smooth
from ray_nascomp.deployment import export
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.exporters import exporters_for
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.deployment.scaling import without_scales
from ray_nascomp.deployment.templates import Build, Template, Templates
from ray_nascomp.tasks.axes import sequence_axes

NAMES = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def bert():
    model, inputs = make("bert", "sdpa")
    way = exporters_for(model, inputs)[0]
    names = tuple(inputs)
    proto = way.export(model, inputs, names, sequence_axes(model, inputs))
    return model, inputs, names, proto


def test_a_pruned_network_takes_the_graph_of_the_whole_one(bert):
    model, inputs, names, proto = bert
    template = Template.of(proto, model)
    pruned, _ = make("bert", "sdpa", seed=1)
    remove_heads(pruned, find_attentions(pruned)[1], [0, 2])
    filled = template.fill(pruned)
    found = run_session(make_session(filled.SerializeToString()), inputs, names)
    with torch.no_grad():
        assert np.abs(found - pruned(**inputs).logits.numpy()).max() < 1e-5
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert proto.ByteSize() - len(template.graph) > 0.95 * weights


def test_a_graph_that_holds_a_changed_tensor_in_another_form_is_not_used_again(bert):
    model, _, _, proto = bert
    template = Template.of(proto, model)
    name = "classifier.weight"
    hidden = Template(template.graph, template.sources, {name: "digest of other content"})
    assert template.fill(model) is not None
    assert hidden.fill(model) is None


def test_networks_with_other_settings_or_shapes_have_other_templates(bert):
    model, *_ = bert
    pruned, _ = make("bert", "sdpa")
    remove_heads(pruned, find_attentions(pruned)[0], [1])
    precise, _ = make("bert", "sdpa")
    precise.bert.embeddings.LayerNorm.eps = 1e-3
    whole, smaller, other = (Build.of(each, "way") for each in (model, pruned, precise))
    templates = Templates()
    templates.add(whole, Template(b"graph", {}, {}))
    assert templates.get(whole) is not None
    assert templates.get(smaller) is None
    assert templates.get(other) is None
    templates.fails(whole)
    assert templates.get(whole) is None


def test_files_are_the_same_with_and_without_graphs_of_earlier_networks(bert, monkeypatch):
    model, inputs, names, _ = bert
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]

    def smoothed():
        network, _ = make("bert", "sdpa", seed=2)
        remove_heads(network, find_attentions(network)[2], [3])
        smooth(network, layers[:7], [inputs], 0.7)
        return network

    files = []
    for earlier in ([], [model, smoothed()]):
        monkeypatch.setattr(export, "_templates", Templates())
        for network in earlier:
            export.export_onnx(network, inputs, names)
        files.append(compact(export.export_onnx(smoothed(), inputs, names)))
    assert files[0] == files[1]
    with torch.no_grad():
        expected = smoothed()(**inputs).logits.numpy()
    assert np.abs(run_session(make_session(files[1]), inputs, names) - expected).max() < 1e-5


def test_layers_are_smoothed_again_after_they_were_plain(bert):
    _, inputs, *_ = bert
    network, _ = make("bert", "sdpa")
    renamed = smooth(network, ["classifier"], [inputs], 0.5)
    with without_scales(network) as layers:
        assert list(layers) == ["classifier"]
        assert type(network.classifier) is nn.Linear
    assert network.get_submodule(renamed["classifier"]) is network.classifier[1]


def _task():
    model, inputs = make("bert", "sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # Exporters make one tensor of equal ones, such as norms that are not trained yet.
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(5, 100, (48, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (48, 1), generator=generator)).long()
    data = {**{name: torch.zeros_like(ids) for name in inputs}, "input_ids": ids * mask, "attention_mask": mask}
    labels = torch.randint(0, 3, (48,), generator=generator)
    return nc.Task(model, (data, labels), (data, labels))


@pytest.mark.parametrize("method", ["ptq", "qat", "lsq"])
def test_a_trial_exports_its_structure_once(monkeypatch, method):
    monkeypatch.setattr(export, "_templates", Templates())
    task = _task()
    task.file_layout  # noqa: B018  # Exports the task's own model.
    exports = []
    plain = export._new_graph
    monkeypatch.setattr(export, "_new_graph", lambda *arguments: exports.append(1) or plain(*arguments))
    config = {"prune": {"sparsity": 0.5}, "quantize": {"method": method, "bits": 8, "start": 0.0}}
    nc.compress(task, config, epochs=2)
    assert len(exports) == 1


def test_a_second_trial_reports_what_it_would_report_as_the_first(monkeypatch):
    config = {"quantize": {"bits": 8}, "prune": {"sparsity": 0.5}, "finetune": {"lr": 1e-3, "distill": {"weight": 0.5}}}
    reports = []
    for earlier in ([], [{}, {"quantize": {"bits": 4}}]):
        monkeypatch.setattr(export, "_templates", Templates())
        task = _task()
        for other in earlier:
            nc.compress(task, other, epochs=1)
        steps = list(nc.compress_steps(task, config, epochs=2))
        reports.append(
            [[step.metrics[key] for key in ("accuracy", "accuracy_drop", "size_mb", "export_error")] for step in steps]
        )
        files = steps[-1].artifact.content
        reports[-1].append(files)
    assert reports[0] == reports[1]
