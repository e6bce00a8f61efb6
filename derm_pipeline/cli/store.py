"""Commands about the store: where something came from, whether it is sound, what may go."""

from __future__ import annotations

import json

import click

from derm_pipeline.cli.shared import UserError, with_workspace
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.store import Store


@click.command()
@click.argument("artifact_or_image")
@click.option("--json", "as_json", is_flag=True, help="The whole walk as JSON (docs/lineage.schema.json).")
@with_workspace
def lineage(workspace: Workspace, artifact_or_image: str, as_json: bool) -> None:
    r"""Walk from an artifact or one synthetic image to the files that it came from.

    \b
    derm lineage quickstart/000123           a synthetic image, by its sample_id
    derm lineage path/to/000123.png          ... or by its file
    derm lineage generator/quickstart        an artifact: asset/partition[/key], or a key
    """
    from derm_pipeline.defs.overview import trace, tree_lines

    walk = trace(workspace, artifact_or_image)
    click.echo(json.dumps(walk, indent=1) if as_json else "\n".join(tree_lines(walk)))


@click.command()
@with_workspace
def verify(workspace: Workspace) -> None:
    """Read every file of the store again and name whatever is not as its manifest says."""
    store = workspace.store
    problems = store.verify()
    for problem in problems:
        click.echo(str(problem), err=True)
    for path in store.unfinished():
        click.echo(f"{path.relative_to(store.root)}: an interrupted build; the same run resumes it")
    if problems:
        raise UserError(f"{len(problems)} problems; remove the named directories and run their recipe again")
    click.echo(f"{sum(1 for _ in store.artifacts()):,} artifacts, every file as its manifest says")


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@with_workspace
def prune(workspace: Workspace, dry_run: bool) -> None:
    """Remove artifacts that no current one is or was made from, and interrupted builds."""
    store: Store = workspace.store
    doomed = store.prune(dry_run=True)
    freed = sum(path.stat().st_size for folder in doomed for path in folder.rglob("*") if path.is_file())
    if not dry_run:
        store.prune()
    for folder in doomed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {folder.relative_to(store.root)}")
    click.echo(f"{len(doomed)} directories, {freed / 1e6:.1f} MB")
