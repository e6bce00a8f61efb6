"""What all assets have in common: an owner, a pool for the heavy ones, how progress is shown."""

import dagster as dg

from derm_pipeline.defs.progress import Progress, logging_show
from derm_pipeline.defs.resources import Shower

Asset = dg.AssetsDefinition | dg.SourceAsset

OWNERS = ["team:derm_pipeline"]

GPU_POOL = "gpu"
"""Assets that take the accelerator (or all cores): one at a time."""


def progress(context: dg.AssetExecutionContext, shower: Shower) -> Progress:
    """The callbacks of this asset: the command line's bars where there are some, otherwise the log."""
    name = context.asset_key.to_user_string()
    return Progress(shower.show or logging_show(context.log.info), name)
