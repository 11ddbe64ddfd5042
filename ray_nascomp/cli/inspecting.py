"""`ray-nascomp inspect`: what a model is made of and what can be searched, before any search."""

from __future__ import annotations

from typing import Any

import click

from ray_nascomp.cli.output import as_json_option, print_json, print_table, working
from ray_nascomp.cli.sources import load_structure, source_options


@click.command()
@source_options
@click.option("--bits", type=click.Choice(["uniform", "layer"]), default="uniform", show_default=True)
@as_json_option
def inspect(bits: Any, as_json: bool, **source: Any) -> None:
    """Show a model's layers, groups, dimensions and costs.

    SOURCE is as for compress; a HuggingFace model needs no --data here.

    \b
    Examples:
      ray-nascomp inspect task.py:make_task
      ray-nascomp inspect ./my-bert --elastic
      ray-nascomp inspect ./my-vit --json | jq .costs
    """
    from ray_nascomp import CostModel, compression_space
    from ray_nascomp.cli.search_file import describe
    from ray_nascomp.results.results import flat

    with working("tracing the model"):
        task = load_structure(**source)
        costs = CostModel(task)
        space = flat(compression_space(task, bits=bits))
    layers = costs.layers(costs.plan({}))
    groups = {layer: group.name for group in task.spec.groups for layer in group.layers}
    prunable = {group.name for group in task.spec.prunable_groups}
    dimensions = {path: describe(value) for path, value in space.items()}
    if as_json:
        print_json(
            {
                "layers": [
                    {"name": cost.name, "kind": cost.kind, "group": groups.get(cost.name), "params": cost.params,
                     "macs": cost.macs, "bytes": cost.bytes}
                    for cost in layers
                ],
                "groups": [
                    {"name": g.name, "width": g.width, "layers": g.layers, "prunable": g.prunable}
                    for g in task.spec.groups
                ],
                "dimensions": dimensions,
                "costs": costs({}),
            }
        )  # fmt: skip
        return
    rows = []
    for cost in layers:
        group = groups.get(cost.name, "")
        whole = " (left whole)" if group and group not in prunable else ""
        rows.append((cost.name, cost.kind, cost.params, cost.macs, group + whole))
    print_table(("layer", "kind", "params", "MACs", "group"), rows)
    click.echo()
    print_table(("dimension", "values"), dimensions.items())
    click.echo()
    dense = costs({})
    print_table(("params", "MACs", "size MB"), [(int(dense["params"]), int(dense["macs"]), dense["size_mb"])])
