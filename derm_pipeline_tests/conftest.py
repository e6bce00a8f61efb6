"""A project in miniature: drawn images, a recipe with a budget of a few steps, and one finished run of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.sources.phantom import PhantomSource
from derm_pipeline.sources.phantom.drawing import PhantomConfig
from derm_pipeline.store import Artifact

# Before torch is imported, here and in the processes that tests start: networks as small as these gain nothing from a
# second thread, threads that spin on a busy machine cost most of the time, and equal digests need equal numbers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NUM_IMAGES = 140

TINY = """\
title: Everything, a few steps each
extends: quickstart
latents: {size_px: 32, orientations: 2, shard_size: 64}
reconstruction: {psnr_db: 0, ssim: -1}
autoencoder:
  network: {width: 8, num_blocks: 1}
  training: {num_steps: 20, batch_size: 8, checkpoint_every_steps: 5}
generator:
  width: 32
  depth: 1
  heads: 2
  training: {num_steps: 40, batch_size: 8, checkpoint_every_steps: 5}
synthetic_dataset: {num_samples: 84, num_steps: 3, batch_size: 4}
classifiers: {num_seeds: 2, width: 8, num_steps: 10, batch_size: 16}
fidelity: {num_repeats: 2}
group_metrics: {num_bootstrap: 100}
"""

SOURCE_ASSETS = ("records", "hair", "descriptors", "visual_captions", "metadata_captions")
RECIPE_ASSETS = (
    "training_set",
    "evaluation_set",
    "validation_set",
    "autoencoder",
    "latents",
    "generator",
    "synthetic_dataset",
    "classifiers",
    "fidelity",
    "group_metrics",
    "report",
)


@dataclass(frozen=True)
class Project:
    """A folder as a user has it: dagster.yaml, data/recipes/tiny.yaml; raw images may lie elsewhere."""

    folder: Path
    raw: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def workspace(self) -> Workspace:
        return Workspace(data=self.data, raw=self.raw)

    def environment(self) -> dict[str, str]:
        """For subprocesses: nobody's settings, and as many threads as here, since the last bits depend on that."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DERM_", "DAGSTER_"))}
        return kept | {"DERM_DATA": str(self.data), "DERM_RAW": str(self.raw)}

    def artifacts(self) -> dict[str, Artifact]:
        """Every current artifact of the recipe tiny, by asset."""
        store = self.workspace.store
        found = {asset: store.current(asset, "phantom") for asset in SOURCE_ASSETS}
        found |= {asset: store.current(asset, "tiny") for asset in RECIPE_ASSETS}
        return found | {asset: store.current(asset) for asset in ("splits", "leaderboard")}

    def digests(self) -> dict[str, str]:
        """The content digest of every current artifact."""
        return {asset: artifact.manifest.content_digest for asset, artifact in self.artifacts().items()}

    def keys(self) -> dict[str, str]:
        """The key of every current artifact."""
        return {asset: artifact.manifest.key for asset, artifact in self.artifacts().items()}


def new_project(folder: Path, raw: Path | None = None) -> Project:
    """A folder with a dagster.yaml as the repository's own and the recipe tiny."""
    (folder / "data" / "recipes").mkdir(parents=True)
    (folder / "data" / "recipes" / "tiny.yaml").write_text(TINY)
    shutil.copy(Path(__file__).parent.parent / "dagster.yaml", folder)
    return Project(folder, raw or folder / "data" / "raw")


def run_tiny(project: Project) -> None:
    """Materialise the recipe in this process, with dagster's storage in memory."""
    from derm_pipeline.defs.jobs import RecipeRun

    with dg.DagsterInstance.ephemeral() as instance:
        run = RecipeRun("tiny", project.workspace, instance, lambda *_: None)
        list(run.materialise_sources())
        list(run.materialise_stages())


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder with the source phantom, small; read it only."""
    raw = tmp_path_factory.mktemp("raw")
    PhantomSource(PhantomConfig(num_images=NUM_IMAGES, width_px=64, height_px=48)).prepare(raw / "phantom")
    return raw


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Project:
    """A project whose recipe tiny ran to its end; read it only."""
    project = new_project(tmp_path_factory.mktemp("finished"), phantoms)
    run_tiny(project)
    return project


@pytest.fixture
def project(tmp_path: Path, finished: Project) -> Project:
    """A copy of the finished project, raw images too, to do with as one likes."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder)
    shutil.copytree(finished.raw, folder / "data" / "raw")
    return Project(folder, folder / "data" / "raw")
