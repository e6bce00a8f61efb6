"""Commands about recipes: run one, list them, open a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from derm_pipeline.cli.shared import progress_bars, with_workspace
from derm_pipeline.defs.workspace import Workspace


@click.command()
@click.argument("recipe")
@click.option("--fast", is_flag=True, help="Run the recipe's small-budget variant, RECIPE_fast.")
@click.option(
    "--models",
    type=click.Choice(["tiny"]),
    help="Try RECIPE with a tiny random base in minutes: writes <data>/recipes/RECIPE_tiny.yaml, and runs that.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Write event files of the trainings to <data>/tensorboard (another folder: DERM_TENSORBOARD).",
)
@with_workspace
def run(workspace: Workspace, recipe: str, fast: bool, models: str | None, tensorboard: bool) -> None:
    """Materialise everything of RECIPE: from its sources' raw images to its report.

    What the store already holds is found, not made again; an interrupted run resumes where it was.
    """
    from derm_pipeline.defs.stages.beforehand import check_beforehand

    name = f"{recipe}_fast" if fast else recipe
    if models:
        workspace, name = _in_miniature(workspace, name)
    check_beforehand(workspace, name)  # also an error in the recipe is said before any work
    from derm_pipeline.defs.instance import project_instance
    from derm_pipeline.defs.jobs import RecipeRun
    from derm_pipeline.defs.overview import summary_lines

    if tensorboard and workspace.tensorboard is None:
        workspace = replace(workspace, tensorboard=workspace.data / "tensorboard")
    if workspace.tensorboard is not None:
        from derm_pipeline.training.curve import check_tensorboard

        check_tensorboard()
    with project_instance(Path.cwd(), workspace.data) as instance, progress_bars() as show:
        recipe_run = RecipeRun(name, workspace, instance, show)
        for _ in recipe_run.materialise_sources():
            pass
        for _ in recipe_run.materialise_stages():
            pass
    click.echo("\n".join(summary_lines(workspace, name)))


def _in_miniature(workspace: Workspace, recipe: str) -> tuple[Workspace, str]:
    """The recipe with a tiny base, written where it is not there yet, and a workspace that knows it."""
    from derm_pipeline.recipes.tiny import tiny_name, write_tiny_recipe

    there = [source for source in workspace.sources_of(recipe) if workspace.has_files_of(source)]
    path = write_tiny_recipe(recipe, workspace.recipe_files, workspace.data, known=workspace.sources, there=there)
    click.echo(f"{path}: what is run; change it there, or delete it to have it written anew")
    return replace(workspace), tiny_name(recipe)


@click.command()
@click.argument("recipe", required=False)
@with_workspace
def recipes(workspace: Workspace, recipe: str | None) -> None:
    """List the recipes, or print RECIPE with every setting filled in."""
    import yaml

    if recipe:
        settings = workspace.recipe(recipe).model_dump(mode="json")
        click.echo(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100), nl=False)
        return
    for name in sorted(workspace.recipe_files):
        found = workspace.recipe(name)
        click.echo(f"{name}: {found.title} ({', '.join(found.sources)})")
    click.echo(f"Your own go into {workspace.data / 'recipes'}.")


@click.command()
@click.argument("recipe")
@click.option("--open", "in_browser", is_flag=True, help="Open it in the browser.")
@with_workspace
def report(workspace: Workspace, recipe: str, in_browser: bool) -> None:
    """Print the path of RECIPE's report (and its figures), or open it."""
    from derm_pipeline.defs.overview import summary_lines

    click.echo("\n".join(summary_lines(workspace, recipe)))
    if in_browser:
        click.launch(str(workspace.store.current("report", recipe).path("report.html")))
