import pytest

from derm_pipeline.models.pretrained.base import Base, load_base
from derm_pipeline.models.pretrained.config import TINY_FAMILIES, PretrainedConfig
from derm_pipeline.models.pretrained.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """A tiny pipeline of each kind, by its name; read only."""
    root = tmp_path_factory.mktemp("bases")
    return {family: write_tiny(family, root / family, seed=3) for family in TINY_FAMILIES}


@pytest.fixture(scope="session")
def bases(tiny_folders) -> dict[str, Base]:
    """The same, loaded in float32; not to be trained."""
    return {name: load_base(settings(folder)) for name, folder in tiny_folders.items()}


def settings(folder, **further) -> PretrainedConfig:
    return PretrainedConfig(model=str(folder), **{"dtype": "float32"} | further)
