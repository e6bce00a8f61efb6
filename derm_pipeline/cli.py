"""derm: the pipeline on the command line. Each command parses, calls, prints."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from derm_pipeline import __version__
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.store import Store, StoreError

Command = Callable[..., Any]


class UserError(click.ClickException):
    """One clear line, and exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"derm: {self.format_message()}", err=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can cause into one line."""
    try:
        with _FullDisk():
            yield
    except (StoreError, ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except ArithmeticError as error:
        from derm_pipeline.training.loop import NonFiniteLossError

        if not isinstance(error, NonFiniteLossError):
            raise
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
        raise


class _FullDisk:
    """Says that the disk is full, whoever noticed: Python, safetensors (an error of its own) or Dagster's SQLite."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        cause, seen = error, set[int]()
        while cause is not None and id(cause) not in seen:  # a chain may be a circle
            seen.add(id(cause))
            if _says_disk_full(cause):
                where = getattr(cause, "filename", None) or "while writing"
                raise UserError(
                    f"the disk is full ({where}); free some space (`derm prune` helps) and run the same command again: "
                    "finished work is kept"
                ) from error
            cause = cause.__cause__ or cause.__context__


def _says_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in (os.strerror(errno.ENOSPC), "database or disk is full"))


def with_workspace(command: Command) -> Command:
    """Give a command its workspace: --data, --raw."""

    @click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: os.environ.get("DERM_DATA", "data"),
        show_default="data, or DERM_DATA",
        help="Folder of the store, of your own recipes and of Dagster's database.",
    )
    @click.option(
        "--raw",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: os.environ.get("DERM_RAW"),
        show_default="<data>/raw, or DERM_RAW",
        help="Folder of the sources' own files, one folder a source.",
    )
    @wraps(command)
    def wrapped(data: Path, raw: Path | None, **arguments: Any) -> Any:
        folder = Path(data).resolve()
        with user_errors():
            return command(Workspace(data=folder, raw=Path(raw).resolve() if raw else folder / "raw"), **arguments)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="derm")
def main() -> None:
    r"""From real dermatology datasets to synthetic ones, with evidence of whom the synthetic data helps.

    \b
    derm run quickstart            everything, on drawn images, in minutes
    derm lineage quickstart/000123 where did this image come from?
    derm report quickstart         the page with all figures and pictures
    """


@main.command()
@click.argument("recipe")
@click.option("--fast", is_flag=True, help="Run the recipe's small-budget variant, RECIPE_fast.")
@with_workspace
def run(workspace: Workspace, recipe: str, fast: bool) -> None:
    """Materialise everything of RECIPE: from its sources' raw images to its report.

    What the store already holds is found, not made again; an interrupted run resumes where it was.
    """
    from derm_pipeline.defs.instance import project_instance
    from derm_pipeline.defs.jobs import RecipeRun
    from derm_pipeline.defs.overview import summary_lines

    name = f"{recipe}_fast" if fast else recipe
    workspace.recipe(name)  # an error in the recipe is said before any work
    with project_instance(Path.cwd(), workspace.data) as instance, progress_bars() as show:
        recipe_run = RecipeRun(name, workspace, instance, show)
        for _ in recipe_run.materialise_sources():
            pass
        for _ in recipe_run.materialise_stages():
            pass
    click.echo("\n".join(summary_lines(workspace, name)))


@main.command()
@with_workspace
def sources(workspace: Workspace) -> None:
    """List the datasets: where their files are looked for, and what is known of them."""
    from derm_pipeline.sources import SOURCES

    for name, source in SOURCES.items():
        folder = workspace.source_folder(name)
        there = "there" if folder.is_dir() else "not there yet"
        click.echo(f"{name}: {source.title}\n  {folder} ({there})\n  {source.licence}; {source.homepage}")
        if workspace.store.has("records", name):
            counts = workspace.store.current("records", name).counts
            click.echo(f"  {counts['num_records']:,} records, {counts['num_quarantined']:,} quarantined")


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
@click.argument("recipe")
@click.option("--open", "in_browser", is_flag=True, help="Open it in the browser.")
@with_workspace
def report(workspace: Workspace, recipe: str, in_browser: bool) -> None:
    """Print the path of RECIPE's report (and its figures), or open it."""
    from derm_pipeline.defs.overview import summary_lines

    click.echo("\n".join(summary_lines(workspace, recipe)))
    if in_browser:
        click.launch(str(workspace.store.current("report", recipe).path("report.html")))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar a stage on a terminal, a line a stage when piped."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def show(stage: str, done: int, total: int, note: str) -> None:
        if not sys.stderr.isatty():
            if done == total:
                click.echo(f"{stage}: {done:,}{', ' + note if note else ''}", err=True)
            return
        bar = bars.get(stage)
        if bar is None or bar.total != total:
            bar = bars[stage] = tqdm(total=total, desc=f"{stage:18}", leave=True, dynamic_ncols=True)
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


if __name__ == "__main__":
    main()
