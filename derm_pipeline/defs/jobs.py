"""A job per recipe: its sources, then the splits, the recipe's own assets and the leaderboard.

A run of dagster has one partition, and a recipe's assets have two kinds (sources and recipes). So a job is two steps,
each of which materialises its assets in runs of their own, with the right partition; `derm run` takes the same way.
"""

# No `from __future__ import annotations`: dagster reads the annotations of resources at run time.
from collections.abc import Iterator, Sequence

import dagster as dg
from dagster._core.definitions.observe import observe  # not exported at the top level yet
from dagster._core.errors import DagsterAssetCheckFailedError, DagsterExecutionInterruptedError

from derm_pipeline.defs.assets import assets_of
from derm_pipeline.defs.instance import living_process
from derm_pipeline.defs.progress import Progress, Show
from derm_pipeline.defs.resources import Shower, workspace_resource
from derm_pipeline.defs.stages.beforehand import check_beforehand
from derm_pipeline.defs.stages.data import prepare_source
from derm_pipeline.defs.workspace import Workspace

RECIPE_TAG = "derm/recipe"
_OF_A_SOURCE = ("records", "hair", "descriptors", "visual_captions", "metadata_captions")
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

Materialised = tuple[str, str, dict[str, dg.MetadataValue]]
"""Asset, partition ("" for none), metadata."""


class FailedCheckError(ValueError):
    """A blocking check did not pass; the message names it and what it found."""


class RecipeRun:
    """Materialises a recipe, in runs of the right partitions, one after the other."""

    def __init__(
        self, recipe: str, workspace: Workspace, instance: dg.DagsterInstance, show: Show | None = None
    ) -> None:
        self.recipe, self.workspace, self.instance, self.show = recipe, workspace, instance, show
        self.sources = workspace.sources_of(recipe)
        self.assets = assets_of(workspace)

    def materialise_sources(self) -> Iterator[Materialised]:
        """Observe the raw files and materialise every asset of the recipe's sources, one run a source."""
        for source in self.sources:
            count = Progress(self.show, "raw_images").count if self.show else None
            prepare_source(self.workspace, source, count)
        resources = self._resources()
        observe([self.assets["raw_images"]], instance=self.instance, resources=resources, run_config=_QUIET)
        for source in self.sources:
            yield from self._materialise(_OF_A_SOURCE, source)

    def materialise_stages(self) -> Iterator[Materialised]:
        """Materialise the splits, every asset of the recipe, and the leaderboard, in one run."""
        names = [name for name in self.assets if name not in ("raw_images", *_OF_A_SOURCE)]
        yield from self._materialise(names, self.recipe)

    def _resources(self) -> dict[str, object]:
        return {"workspace": workspace_resource(self.workspace), "shower": Shower(self.show)}

    def _materialise(self, names: Sequence[str], partition: str) -> Iterator[Materialised]:
        with living_process(self.instance, self.workspace.data) as tags:
            try:
                result = dg.materialize(
                    list(self.assets.values()),
                    selection=[self.assets[name] for name in names],
                    partition_key=partition,
                    instance=self.instance,
                    resources=self._resources(),
                    run_config=_QUIET,
                    tags={RECIPE_TAG: self.recipe, **tags},
                )
            except DagsterExecutionInterruptedError:
                raise KeyboardInterrupt from None  # Ctrl-C, in the word that callers know
            except DagsterAssetCheckFailedError as error:
                raise FailedCheckError("; ".join(self._failed_checks(tags)) or str(error)) from error
        for event in result.get_asset_materialization_events():
            done = event.materialization
            yield done.asset_key.to_user_string(), done.partition or "", dict(done.metadata)

    def _failed_checks(self, tags: dict[str, str]) -> Iterator[str]:
        for run in self.instance.get_runs(dg.RunsFilter(tags=tags)):
            for entry in self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
                assert entry.dagster_event
                found = entry.dagster_event.asset_check_evaluation_data
                if not found.passed and found.blocking:
                    asset = found.asset_key.to_user_string()
                    yield f"the check {found.check_name} of {asset} failed: {found.description or 'see its metadata'}"


def recipe_job(recipe: str, workspace: Workspace) -> dg.JobDefinition:
    """The job of one recipe."""

    @dg.op(name=f"{recipe}_sources", out=dg.Out(dg.Nothing))
    def its_sources(context: dg.OpExecutionContext) -> None:
        check_beforehand(workspace, recipe)
        _log(context, RecipeRun(recipe, workspace, context.instance).materialise_sources())

    @dg.op(name=f"{recipe}_stages", ins={"after": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
    def its_stages(context: dg.OpExecutionContext) -> None:
        _log(context, RecipeRun(recipe, workspace, context.instance).materialise_stages())

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
        context.log.info(f"{asset}{f'[{partition}]' if partition else ''} is {artifact.value if artifact else 'there'}")
