"""What is told of every row, and which autoencoder a generator learnt with."""

import pyarrow as pa
import pytest

from derm_pipeline.defs.stages.fitting import autoencoder_of, labels_of
from derm_pipeline.defs.stages.generator import synthetic_dataset
from derm_pipeline.models.conditions import condition_classes
from derm_pipeline.records import AgeBand, Diagnosis, SkinType
from derm_pipeline.store import Request, StoreError
from derm_pipeline_tests.conftest import new_project
from derm_pipeline_tests.generation.networks import generator_at, with_networks

ROWS = pa.table(
    {
        "diagnosis": ["mel", "nv", "mel"],
        "skin_type": pa.array([None, 3, None], pa.int32()),
        "sex": pa.array([None, None, "female"], pa.string()),
        "site": pa.array([None] * 3, pa.string()),
        "age_years": pa.array([None, 41.0, None], pa.float64()),
        "age_range": pa.array([None, None, None], pa.string()),
    }
)


def test_every_row_has_the_index_of_its_class_or_of_the_null_class():
    names = ("diagnosis", "skin_type", "sex", "age_band", "site")
    classes = condition_classes(names, [Diagnosis.MEL, Diagnosis.NV])
    told = labels_of(ROWS, classes)
    assert told["diagnosis"].tolist() == [0, 1, 0]
    assert told["skin_type"].tolist() == [6, list(SkinType).index(SkinType(3)), 6]
    assert told["sex"].tolist() == [len(classes["sex"])] * 2 + [classes["sex"].index("female")]
    assert told["age_band"].tolist()[1] == classes["age_band"].index(AgeBand.of(41.0))
    assert told["site"].tolist() == [len(classes["site"])] * 3


@pytest.fixture
def project(tmp_path):
    return with_networks(new_project(tmp_path / "project"), generator_at(tmp_path / "networks"))


def test_a_generator_is_never_given_another_autoencoder(project):
    store = project.workspace.store
    generator, learnt_with = store.current("generator", "tiny"), store.current("autoencoder", "tiny")
    assert autoencoder_of(store, generator) == learnt_with.reference
    newer = Request("autoencoder", "tiny", {}, {"newer": True}, "1")
    store.obtain(newer, lambda build: build.write_json("autoencoder.json", {}))
    store.obtain(Request("training_set", "tiny", {}, {}, "1"), lambda build: None)
    with pytest.raises(ValueError, match=r"learnt latents of another autoencoder than .*: materialise latents and gen"):
        synthetic_dataset(project.workspace, "tiny")
    assert autoencoder_of(store, generator) == learnt_with.reference


def test_latents_that_are_gone_are_named(project):
    store = project.workspace.store
    generator = store.current("generator", "tiny")
    store.current("latents", "tiny").path("manifest.json").unlink()
    with pytest.raises(StoreError, match=r"the latents of generator/tiny/.* are not in"):
        autoencoder_of(store, generator)
