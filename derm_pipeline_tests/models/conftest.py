import pytest

from derm_pipeline.models.pretrained.config import TINY_FAMILIES
from derm_pipeline.models.pretrained.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory):
    """The folder of a tiny pipeline of each kind, by its name; read only."""
    root = tmp_path_factory.mktemp("pipelines")
    return {family: write_tiny(family, root / family, seed=5) for family in TINY_FAMILIES}
