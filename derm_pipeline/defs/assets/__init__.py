"""Assets: each picks its inputs, calls one stage, and reports what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from derm_pipeline.defs.assets.shared import Asset
    from derm_pipeline.defs.workspace import Workspace


def assets_of(workspace: Workspace) -> dict[str, Asset]:
    """Every asset of the graph over a workspace, by its name, upstream first."""
    from derm_pipeline.defs.assets.data import source_assets
    from derm_pipeline.defs.assets.recipes import recipe_assets

    of_sources = {asset.key.to_user_string(): asset for asset in source_assets(workspace)}
    of_recipes = {asset.key.to_user_string(): asset for asset in recipe_assets(workspace, of_sources)}
    return of_sources | of_recipes
