"""The two partitions of the graph, and how one follows from the other."""

from __future__ import annotations

import dagster as dg

from derm_pipeline.defs.workspace import Workspace


def sources(workspace: Workspace) -> dg.StaticPartitionsDefinition:
    """One partition a source."""
    return dg.StaticPartitionsDefinition(list(workspace.sources))


def recipes(workspace: Workspace) -> dg.StaticPartitionsDefinition:
    """One partition a recipe: the partition grid is the experiment grid."""
    return dg.StaticPartitionsDefinition(sorted(workspace.recipe_files))


def sources_to_recipes(workspace: Workspace) -> dg.StaticPartitionMapping:
    """A source is upstream of the recipes that name it."""
    downstream: dict[str, list[str]] = {source: [] for source in workspace.sources}
    for recipe in workspace.recipe_files:
        for source in workspace.sources_of(recipe):
            if source in downstream:
                downstream[source].append(recipe)
    return dg.StaticPartitionMapping({source: names for source, names in downstream.items() if names})
