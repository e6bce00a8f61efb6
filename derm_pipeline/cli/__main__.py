"""`python -m derm_pipeline.cli`, for where the command `derm` is not on the path."""

from derm_pipeline.cli import main

main()
