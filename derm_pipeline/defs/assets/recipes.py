"""Assets of a recipe, from its training set to its report; and the leaderboard of all recipes."""

# No `from __future__ import annotations`: dagster reads the annotations of resources at run time.
from collections.abc import Mapping

import dagster as dg

from derm_pipeline.defs import partitions
from derm_pipeline.defs.assets.shared import GPU_POOL, OWNERS, Asset, progress
from derm_pipeline.defs.reporting import check, materialised, thumbnail
from derm_pipeline.defs.resources import Shower
from derm_pipeline.defs.stages import evaluation, generator, reports, sets, summary
from derm_pipeline.defs.workspace import Workspace

MIN_AGREEMENT = 0.5
"""Below this agreement a generator does not draw what it is asked for; far above chance (1 in 7), far below good."""


def recipe_assets(workspace: Workspace, of_sources: Mapping[str, Asset]) -> list[dg.AssetsDefinition]:  # noqa: C901  one graph, read top to bottom
    """The assets that are partitioned by recipe, and the leaderboard; `of_sources` are those upstream, by name."""
    recipes = partitions.recipes(workspace)
    by_source = partitions.sources_to_recipes(workspace)

    def of_source(name: str) -> dg.AssetDep:
        return dg.AssetDep(of_sources[name], partition_mapping=by_source)

    @dg.asset(
        partitions_def=recipes,
        deps=[
            of_source("records"),
            of_source("hair"),
            of_source("metadata_captions"),
            of_source("visual_captions"),
            of_sources["splits"],
        ],
        group_name="3_splits",
        kinds={"parquet"},
        owners=OWNERS,
        code_version=sets.CODE_VERSIONS["training_set"],
        check_specs=[dg.AssetCheckSpec("nothing_held_out_is_trained_on", asset="training_set", blocking=True)],
    )
    def training_set(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        """The rows, captions and classes that this recipe's generator may see: train split only."""
        artifact = sets.training_set(workspace, context.partition_key)
        problems = summary.leaks(workspace, artifact)
        return materialised(artifact, checks=[check("nothing_held_out_is_trained_on", problems, blocking=True)])

    @dg.asset(
        partitions_def=recipes,
        deps=[of_source("records"), of_sources["splits"]],
        group_name="3_splits",
        kinds={"parquet"},
        owners=OWNERS,
        code_version=sets.CODE_VERSIONS["evaluation_set"],
    )
    def evaluation_set(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.MaterializeResult:
        """The held-out rows (val, test) that this recipe is judged on; no stage of the generator reads them."""
        return materialised(sets.evaluation_set(workspace, context.partition_key))

    @dg.asset(
        partitions_def=recipes,
        deps=[
            of_source("records"),
            of_source("metadata_captions"),  # read where a generator is told captions
            of_source("visual_captions"),
            of_sources["splits"],
        ],
        group_name="3_splits",
        kinds={"parquet"},
        owners=OWNERS,
        code_version=sets.CODE_VERSIONS["validation_set"],
    )
    def validation_set(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.MaterializeResult:
        """Val rows on which a training is watched: nothing is learnt of them, or chosen by them."""
        return materialised(sets.validation_set(workspace, context.partition_key))

    @dg.asset(
        partitions_def=recipes,
        deps=[training_set, validation_set],
        group_name="4_generator",
        kinds={"pytorch"},
        owners=OWNERS,
        pool=GPU_POOL,
        code_version=generator.CODE_VERSIONS["autoencoder"],
        check_specs=[dg.AssetCheckSpec("images_come_back", asset="autoencoder", blocking=True)],
    )
    def autoencoder(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """The VAE between pixels and latents: trained here, or a published one by reference."""
        artifact = generator.autoencoder(workspace, context.partition_key, progress(context, shower).step)
        return materialised(
            artifact,
            picture=summary.reconstructions(workspace, context.partition_key),
            pictures={"loss_curve": summary.loss_picture(artifact)},
            checks=[check("images_come_back", summary.poor_reconstruction(workspace, artifact), blocking=True)],
        )

    @dg.asset(
        partitions_def=recipes,
        deps=[training_set, validation_set, autoencoder],
        group_name="4_generator",
        kinds={"pytorch"},
        owners=OWNERS,
        pool=GPU_POOL,
        code_version=generator.CODE_VERSIONS["latents"],
        check_specs=[dg.AssetCheckSpec("moments_are_finite", asset="latents", blocking=True)],
    )
    def latents(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """Moments of every training image in every orientation, in shards; apart from them, those of val images.

        And embeddings of captions, where the generator is told text.
        """
        artifact = generator.latents(workspace, context.partition_key, progress(context, shower).count)
        problems = summary.non_finite_moments(artifact)
        return materialised(artifact, checks=[check("moments_are_finite", problems, blocking=True)])

    @dg.asset(
        name="generator",
        partitions_def=recipes,
        deps=[training_set, validation_set, latents],
        group_name="4_generator",
        kinds={"pytorch"},
        owners=OWNERS,
        pool=GPU_POOL,
        code_version=generator.CODE_VERSIONS["generator"],
    )
    def generator_(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """Weights, their moving average, the loss of every step and on val images, and samples drawn on the way."""
        artifact = generator.generator(workspace, context.partition_key, progress(context, shower).step)
        return materialised(
            artifact, picture=summary.loss_picture(artifact), pictures={"samples": summary.last_grid(artifact)}
        )

    @dg.asset(
        partitions_def=recipes,
        deps=[training_set, autoencoder, generator_],
        group_name="5_samples",
        kinds={"pytorch", "huggingface"},
        owners=OWNERS,
        pool=GPU_POOL,
        code_version=generator.CODE_VERSIONS["synthetic_dataset"],
        check_specs=[
            dg.AssetCheckSpec("every_sample_tells_where_it_came_from", asset="synthetic_dataset", blocking=True)
        ],
    )
    def synthetic_dataset(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """The samples in the imagefolder convention, one provenance row each, and a card."""
        artifact = generator.synthetic_dataset(workspace, context.partition_key, progress(context, shower).count)
        _, images = evaluation.sample_images(artifact)
        problems = summary.missing_provenance(artifact)
        return materialised(
            artifact,
            picture=thumbnail(images, columns=14, rows=6),
            checks=[check("every_sample_tells_where_it_came_from", problems, blocking=True)],
        )

    @dg.asset(
        partitions_def=recipes,
        deps=[training_set, evaluation_set, synthetic_dataset],
        group_name="6_evaluation",
        kinds={"pytorch"},
        owners=OWNERS,
        pool=GPU_POOL,
        code_version=evaluation.CODE_VERSIONS["classifiers"],
        check_specs=[dg.AssetCheckSpec("samples_show_what_was_asked_for", asset="classifiers")],
    )
    def classifiers(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """Arms x seeds: weights, predictions of held-out images, and the real ones' of the samples."""
        artifact = evaluation.classifiers(workspace, context.partition_key, progress(context, shower).named)
        agreement = artifact.counts["agreement"]["all"]
        problems = [] if agreement >= MIN_AGREEMENT else [f"agreement {agreement:.2f} is below {MIN_AGREEMENT}"]
        return materialised(artifact, checks=[check("samples_show_what_was_asked_for", problems, blocking=False)])

    @dg.asset(
        partitions_def=recipes,
        deps=[training_set, evaluation_set, synthetic_dataset, classifiers, autoencoder],
        group_name="6_evaluation",
        kinds={"numpy"},
        owners=OWNERS,
        code_version=evaluation.CODE_VERSIONS["fidelity"],
        check_specs=[dg.AssetCheckSpec("samples_are_not_copies", asset="fidelity")],
    )
    def fidelity(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """KID, Fréchet distance and PRDC beside the real-against-real floor; and copies."""
        artifact = evaluation.fidelity(workspace, context.partition_key, progress(context, shower).count)
        problems = summary.copy_problems(artifact)
        return materialised(artifact, checks=[check("samples_are_not_copies", problems, blocking=False)])

    @dg.asset(
        partitions_def=recipes,
        deps=[classifiers],
        group_name="6_evaluation",
        kinds={"numpy"},
        owners=OWNERS,
        code_version=evaluation.CODE_VERSIONS["group_metrics"],
    )
    def group_metrics(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.MaterializeResult:
        """Per-group and worst-group figures with intervals, and the gain of each arm over real data alone."""
        return materialised(evaluation.group_metrics(workspace, context.partition_key))

    @dg.asset(
        partitions_def=recipes,
        deps=[
            training_set,
            evaluation_set,
            autoencoder,
            generator_,
            synthetic_dataset,
            classifiers,
            fidelity,
            group_metrics,
        ],
        group_name="7_reports",
        kinds={"html"},
        owners=OWNERS,
        code_version=evaluation.CODE_VERSIONS["report"],
    )
    def report(context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        """One self-contained HTML page: images, curves, tables, lineage."""
        artifact = reports.report(workspace, context.partition_key)
        url = dg.MetadataValue.url(artifact.path(reports.REPORT).resolve().as_uri())
        return materialised(artifact, metadata={"report": url})

    @dg.asset(
        deps=[report],
        group_name="7_reports",
        kinds={"html"},
        owners=OWNERS,
        code_version=evaluation.CODE_VERSIONS["leaderboard"],
    )
    def leaderboard(workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        """All recipes side by side."""
        artifact = reports.leaderboard(workspace)
        rows = artifact.table(reports.LEADERBOARD).to_pylist()
        return materialised(artifact, tables={"leaderboard": rows})

    return [
        training_set,
        evaluation_set,
        validation_set,
        autoencoder,
        latents,
        generator_,
        synthetic_dataset,
        classifiers,
        fidelity,
        group_metrics,
        report,
        leaderboard,
    ]
