"""Assembly: one set of definitions over one workspace."""

from __future__ import annotations

import dagster as dg

from derm_pipeline.defs.progress import Show
from derm_pipeline.defs.resources import Shower, default_workspace, workspace_resource
from derm_pipeline.defs.workspace import Workspace


def build_defs(workspace: Workspace | None = None, show: Show | None = None) -> dg.Definitions:
    """The definitions over a workspace (by default `data/` under the working directory).

    Args:
        workspace: where everything lies.
        show: how progress is shown; None for the run's log.
    """
    from derm_pipeline.defs.assets import assets_of
    from derm_pipeline.defs.jobs import recipe_job

    workspace = workspace or default_workspace()
    return dg.Definitions(
        assets=list(assets_of(workspace).values()),
        jobs=[recipe_job(name, workspace) for name in sorted(workspace.recipe_files)],
        resources={"workspace": workspace_resource(workspace), "shower": Shower(show)},
    )
