"""What assets are handed: the workspace, and how progress is shown. Dependency injection only."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from derm_pipeline.defs.progress import Show
from derm_pipeline.defs.workspace import Workspace


def default_workspace() -> Workspace:
    """`data/` under the working directory; raw sources in `data/raw`, or where DERM_RAW says.

    Trainings write TensorBoard's event files where DERM_TENSORBOARD says; without it they write none.
    """
    data = Path(os.environ.get("DERM_DATA", "data")).resolve()
    events = os.environ.get("DERM_TENSORBOARD")
    return Workspace(
        data=data,
        raw=Path(os.environ.get("DERM_RAW", data / "raw")).resolve(),
        tensorboard=Path(events).resolve() if events else None,
    )


def workspace_resource(workspace: Workspace) -> dg.ResourceDefinition:
    """The workspace as a resource."""
    return dg.ResourceDefinition.hardcoded_resource(workspace)


class Shower:
    """Holds the progress hook; None means that assets log."""

    def __init__(self, show: Show | None = None) -> None:
        self.show = show
