"""Commands about sources: what there is, getting them, their captions for other programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import cast

import click

from derm_pipeline.captions.carriers import CARRIERS, Carrier
from derm_pipeline.captions.metadata import STYLES
from derm_pipeline.cli.shared import UserError, progress_bars, with_workspace
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.models.pretrained.config import TINY_FAMILIES, TinyFamily
from derm_pipeline.records import Split, canonical
from derm_pipeline.sources.fetch.archives import in_words
from derm_pipeline.sources.fetch.downloads import DOWNLOADS, Application, how_to_get
from derm_pipeline.sources.layout import NotUnpackedError


@click.command()
@click.argument("source", required=False)
@with_workspace
def sources(workspace: Workspace, source: str | None) -> None:
    """List the datasets: found or not, where, how many rows and diagnoses, licence, how to get them.

    With SOURCE also what to cite, and what each of its labels means here.
    """
    if source is None:
        for name in workspace.sources:
            click.echo("\n".join(_facts(workspace, name)))
        click.echo(f"Your own are described in {workspace.data / 'sources.yaml'}.")
        return
    _check_source(workspace, source)
    found = workspace.sources[source]
    click.echo("\n".join(_facts(workspace, source)))
    click.echo(f"  cite: {found.citation}\n\n{how_to_get(source)}")
    click.echo("its label -> diagnosis here")
    for label, diagnosis in sorted(found.diagnoses.items()):
        click.echo(f"  {label} -> {f'{diagnosis.value} ({diagnosis.phrase})' if diagnosis else 'none'}")


def _facts(workspace: Workspace, name: str) -> list[str]:
    source, folder = workspace.sources[name], workspace.source_folder(name)
    try:
        listing = source.list_images(folder)
    except NotUnpackedError as error:
        state, rows = "found, and not unpacked yet", f"  {error}"
    except FileNotFoundError as error:
        # A drawn source needs no getting; of the others this says what is missing in a folder that is there.
        state, rows = "not found", "" if not folder.is_dir() or name == "phantom" else f"  {error}"
    except (ValueError, OSError) as error:
        state, rows = "found, and cannot be read", f"  {error}"
    else:
        diagnoses = Counter(candidate.diagnosis for candidate in listing.candidates)
        counts = [f"{one.value} {diagnoses[one]:,}" for one in canonical(filter(None, diagnoses))]
        counts += [f"none {diagnoses[None]:,}"] if diagnoses[None] else []
        quarantined = ""
        if bad := listing.quarantined:
            first = f"{bad[0].image_id or bad[0].file or 'a row'}, {bad[0].reason}"
            quarantined = f"; {len(bad):,} rows or files cannot be used, the first: {first}"
        num_missing = sum(candidate.file is None for candidate in listing.candidates)
        packed = " (zip archives are unpacked when first used)" if any(folder.glob("**/*.zip")) else ""
        missing = f"; {num_missing:,} image files are missing{packed}" if num_missing else ""
        state, rows = (
            "found",
            f"  {len(listing.candidates):,} rows{': ' * bool(counts)}{', '.join(counts)}{missing}{quarantined}",
        )
    lines = [f"{name}: {source.title}: {state}", f"  {folder}", rows, f"  licence: {source.licence}"]
    return [line for line in [*lines, f"  get it: {_getting(name)}"] if line.strip()]


def _getting(name: str) -> str:
    if name == "phantom":
        return "drawn on this machine when a recipe needs it"
    if name not in DOWNLOADS:
        return "your own"
    download = DOWNLOADS[name]
    if isinstance(download, Application):
        return f"from its publisher, {download.homepage}; `derm sources {name}` says how"
    size = f", about {in_words(download.about_bytes)}" if download.about_bytes else ""
    return f"derm fetch {name} --accept-licence{size}; `derm sources {name}` says from where"


def _check_source(workspace: Workspace, source: str) -> None:
    if source not in workspace.sources:
        raise UserError(f"{source!r} is not a source; there are {', '.join(workspace.sources)}")


@click.command()
@click.argument("source")
@click.option("--accept-licence", is_flag=True, help="You have read the licence and accept it; asked once.")
@click.option("--replace-changed", is_flag=True, help="Download anew what differs from its record.")
@click.option("--no-unpack", is_flag=True, help="Leave zip archives as they are.")
@with_workspace
def fetch(workspace: Workspace, source: str, accept_licence: bool, replace_changed: bool, no_unpack: bool) -> None:
    """Download SOURCE from its publisher into its folder, or say where to apply for it.

    Resumes where it was interrupted; run again, it checks what is there against the recorded checksums.
    """
    _check_source(workspace, source)
    if source not in DOWNLOADS:
        raise UserError(how_to_get(source).strip())
    from derm_pipeline.sources.fetch.fetch import fetch as fetch_files

    with progress_bars() as show:
        result = fetch_files(
            DOWNLOADS[source],
            workspace.source_folder(source),
            licence=workspace.sources[source].licence,
            accept_licence=accept_licence,
            replace_changed=replace_changed,
            unpack=not no_unpack,
            on_progress=lambda done, total: show(f"fetch {source}", done, total, ""),
        )
    for words, names in (
        ("downloaded", result.downloaded),
        ("there, and as recorded", result.verified),
        ("unpacked", result.unpacked),
        ("unpacked before, archive gone", result.unpacked_before),
        ("named in the table and not on the server", result.absent),
        ("paths refused", result.refused),
        ("unpacked from an archive that was replaced: remove these folders and fetch again", result.outdated_folders),
    ):
        if names:
            click.echo(f"{words}: {len(names):,} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    if result.still_missing:
        click.echo(result.still_missing)


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--style", type=click.Choice([*STYLES, "visual"]), default="rich", show_default=True)
@click.option("--carrier", type=click.Choice(CARRIERS), default="metadata.csv", show_default=True)
@click.option(
    "--split",
    type=click.Choice([*(split.value for split in Split), "all"]),
    default=Split.TRAIN.value,
    show_default=True,
    help="Which side's images; what is tested on must not be trained on elsewhere either.",
)
@click.option("--no-images", is_flag=True, help="Write the captions only.")
@with_workspace
def captions(
    workspace: Workspace, source: str, out: Path, style: str, carrier: Carrier, split: str, no_images: bool
) -> None:
    """Write SOURCE's captions to the folder OUT for another program, with its images beside them.

    The captions must have been materialised: run a recipe that names the source.
    """
    from derm_pipeline.defs.stages.exporting import export_captions

    _check_source(workspace, source)
    count, paths = export_captions(
        workspace, source, out, style=style, carrier=carrier, split=split, with_images=not no_images
    )
    named = paths[0] if len(paths) == 1 else f"{len(paths):,} files in {out}"
    click.echo(f"{count:,} captions ({style}, {split}): {named}")


@click.group()
def models() -> None:
    """Models on disk."""


@models.command()
@click.argument("family", type=click.Choice(["llava_next", "clip_text", *TINY_FAMILIES]))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def tiny(family: str, out: Path) -> None:
    """Write a complete, random, tiny model of FAMILY to the folder OUT, to try a set-up without any download."""
    if family == "llava_next":
        from derm_pipeline.captions.tiny import write_tiny_llava_next

        click.echo(f"{family}: {write_tiny_llava_next(out)}")
        return
    if family == "clip_text":
        from derm_pipeline.models.tiny import write_tiny_clip_text

        click.echo(f"{family}: {write_tiny_clip_text(out)}")
        return
    from derm_pipeline.models.pretrained.tiny import write_tiny

    click.echo(f"{family}: {write_tiny(cast(TinyFamily, family), out)}")
