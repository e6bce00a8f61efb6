"""What dagster loads: `dagster dev` finds `defs` here. Importing it imports no torch."""

from derm_pipeline.defs.build import build_defs

defs = build_defs()
