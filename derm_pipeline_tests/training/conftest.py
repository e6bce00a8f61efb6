from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from derm_pipeline.models.pretrained.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline of a kind; read only."""
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda family: write_tiny(family, root / family, seed=3))
