"""derm: the pipeline on the command line. Each command parses, calls, prints."""

from __future__ import annotations

import click

from derm_pipeline import __version__
from derm_pipeline.cli.export import export
from derm_pipeline.cli.generate import generate
from derm_pipeline.cli.recipes import recipes, report, run
from derm_pipeline.cli.shared import user_errors
from derm_pipeline.cli.sources import captions, fetch, models, sources
from derm_pipeline.cli.store import lineage, prune, verify

__all__ = ["main", "user_errors"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="derm")
def main() -> None:
    r"""From real dermatology datasets to synthetic ones, with evidence of whom the synthetic data helps.

    \b
    derm run quickstart            everything, on drawn images, in minutes
    derm generate --recipe quickstart --diagnosis melanoma --count 20
    derm lineage quickstart/000123 where did this image come from?
    derm report quickstart         the page with all figures and pictures
    """


for command in (run, recipes, report, generate, export, sources, fetch, captions, models, lineage, verify, prune):
    main.add_command(command)
