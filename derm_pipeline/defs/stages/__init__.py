"""What each asset makes: its request to the store, the library's work, the files. Plain functions that know no dagster.

A stage function takes a workspace and a partition and returns the finished artifact; `defs.assets` wraps it for
dagster. Its code version is raised when its result changes for the same inputs and settings.
"""
