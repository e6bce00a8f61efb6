"""The asset graph: thin assets over `defs.stages`."""
