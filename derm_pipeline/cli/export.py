"""The command that writes a recipe's generator for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from derm_pipeline.cli.shared import with_workspace
from derm_pipeline.defs.workspace import Workspace

if TYPE_CHECKING:
    from derm_pipeline.models.export import Precision
    from derm_pipeline.models.lora_forms import Form

_FORMS = ("diffusers", "peft", "kohya")
_PRECISIONS = ("float32", "float16", "bfloat16")


@click.command()
@click.argument("recipe")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", type=click.Choice(_FORMS), required=True, help="Whose files to write.")
@click.option("--dtype", type=click.Choice(_PRECISIONS), help="Of the weights.  [default: as they were trained]")
@with_workspace
def export(workspace: Workspace, recipe: str, out: Path, form: Form, dtype: Precision | None) -> None:
    r"""Write what RECIPE's generator learnt, of a pretrained base, to the folder OUT, with a model card.

    \b
    derm export lesiongen_lora OUT --format diffusers     for pipeline.load_lora_weights("OUT")
    derm export med_art OUT --format peft                 for PeftModel.from_pretrained
    derm export melanoma_sdxl OUT --format kohya          for what reads sd-scripts' files
    """
    from derm_pipeline.defs.stages.exporting import export_recipe

    files = export_recipe(workspace, recipe, out, form, dtype=dtype)
    click.echo(f"{len(files)} files ({form}): {out.resolve()}")
    for path in files:
        click.echo(f"  {path}")
