"""A job per recipe: its sources, then the splits, the recipe's own assets and the leaderboard.

A run of dagster has one partition, and a recipe's assets have two kinds (sources and recipes). So a job is two steps, each
of which materialises its assets in runs of their own, with the right partition; `derm run` takes the same way.
"""

# No `from __future__ import annotations`: dagster reads the annotations of resources at run time.
from collections.abc import Iterator

import dagster as dg
from dagster._core.definitions.observe import observe  # not exported at the top level yet

from derm_pipeline.defs.assets import data
from derm_pipeline.defs.assets.recipes import recipe_assets
from derm_pipeline.defs.progress import Progress, Show
from derm_pipeline.defs.resources import Shower, workspace_resource
from derm_pipeline.defs.stages.data import prepare_source
from derm_pipeline.defs.workspace import Workspace

RECIPE_TAG = "derm/recipe"
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

Materialised = tuple[str, str, dict[str, dg.MetadataValue]]
"""Asset, partition ("" for none), metadata."""


def materialise_sources(
    recipe: str, workspace: Workspace, instance: dg.DagsterInstance, show: Show | None = None
) -> Iterator[Materialised]:
    """Observe the raw files and materialise every asset of the recipe's sources, one run a source."""
    for source in workspace.sources_of(recipe):
        prepare_source(workspace, source, Progress(show, "raw_images").count if show else None)
    resources = _resources(workspace, show)
    observe([data.raw_images], instance=instance, resources=resources, run_config=_QUIET)
    by_source = [asset for asset in data.ASSETS if asset not in (data.raw_images, data.splits)]
    for source in workspace.sources_of(recipe):
        yield from _materialise(data.ASSETS, by_source, source, recipe, instance, resources)


def materialise_recipe(
    recipe: str, workspace: Workspace, instance: dg.DagsterInstance, show: Show | None = None
) -> Iterator[Materialised]:
    """Materialise the splits, every asset of the recipe, and the leaderboard, in one run."""
    assets = recipe_assets(workspace)
    everything = [*data.ASSETS, *assets]
    yield from _materialise(everything, [data.splits, *assets], recipe, recipe, instance, _resources(workspace, show))


def _resources(workspace: Workspace, show: Show | None) -> dict[str, object]:
    return {"workspace": workspace_resource(workspace), "shower": Shower(show)}


def _materialise(
    everything: list[dg.AssetsDefinition | dg.SourceAsset],
    selection: list[dg.AssetsDefinition],
    partition: str,
    recipe: str,
    instance: dg.DagsterInstance,
    resources: dict[str, object],
) -> Iterator[Materialised]:
    result = dg.materialize(
        everything,
        selection=selection,
        partition_key=partition,
        instance=instance,
        resources=resources,
        run_config=_QUIET,
        tags={RECIPE_TAG: recipe},
    )
    for event in result.get_asset_materialization_events():
        done = event.materialization
        yield done.asset_key.to_user_string(), done.partition or "", dict(done.metadata)


def recipe_job(recipe: str, workspace: Workspace) -> dg.JobDefinition:
    """The job of one recipe."""

    @dg.op(name=f"{recipe}_sources", out=dg.Out(dg.Nothing))
    def its_sources(context: dg.OpExecutionContext) -> None:
        _log(context, materialise_sources(recipe, workspace, context.instance))

    @dg.op(name=f"{recipe}_stages", ins={"after": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
    def its_stages(context: dg.OpExecutionContext) -> None:
        _log(context, materialise_recipe(recipe, workspace, context.instance))

    @dg.job(
        name=recipe,
        description=f"Materialises everything of the recipe {recipe}: from its sources' raw images to its report.",
        tags={RECIPE_TAG: recipe},
        executor_def=dg.in_process_executor,
    )
    def job() -> None:
        its_stages(its_sources())

    return job


def _log(context: dg.OpExecutionContext, materialised: Iterator[Materialised]) -> None:
    for asset, partition, metadata in materialised:
        artifact = metadata.get("artifact")
        context.log.info(f"{asset}[{partition}] is {artifact.value if artifact else 'there'}")
