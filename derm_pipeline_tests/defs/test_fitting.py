"""What could only fail or mislead after hours of training is refused before it."""

import pyarrow as pa
import pytest

from derm_pipeline.defs.stages.fitting import autoencoder_of, check_fits, labels_of
from derm_pipeline.defs.stages.generator import synthetic_dataset
from derm_pipeline.models.conditions import condition_classes
from derm_pipeline.recipes import load_recipe, recipe_files
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


def recipe_of(**settings):
    recipe = load_recipe("quickstart", recipe_files())
    return type(recipe).model_validate(recipe.model_dump() | {"name": "own"} | settings)


def with_generator(**changes):
    recipe = recipe_of()
    training = recipe.generator.training.model_dump() | changes.pop("training", {})
    return recipe_of(generator=recipe.generator.model_dump() | {"training": training} | changes)


def test_what_some_image_tells_may_be_a_condition_and_what_none_tells_may_not():
    check_fits(with_generator(conditions=("diagnosis", "skin_type", "sex", "age_band")), ROWS)
    with pytest.raises(ValueError, match="own: generator.conditions: no training image of phantom tells its site"):
        check_fits(with_generator(conditions=("diagnosis", "skin_type", "site")), ROWS)


def test_every_row_has_the_index_of_its_class_or_of_the_null_class():
    names = ("diagnosis", "skin_type", "sex", "age_band", "site")
    classes = condition_classes(names, [Diagnosis.MEL, Diagnosis.NV])
    told = labels_of(ROWS, classes)
    assert told["diagnosis"].tolist() == [0, 1, 0]
    assert told["skin_type"].tolist() == [6, list(SkinType).index(SkinType(3)), 6]
    assert told["sex"].tolist() == [len(classes["sex"])] * 2 + [classes["sex"].index("female")]
    assert told["age_band"].tolist()[1] == classes["age_band"].index(AgeBand.of(41.0))
    assert told["site"].tolist() == [len(classes["site"])] * 3


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            lambda: with_generator(training={"batch_size": 10**9}),
            r"generator.training.batch_size: at least .* smaller b",
        ),
        (lambda: with_generator(width=2**15, depth=100, heads=64), r"generator.network: at least .* smaller network"),
        (
            lambda: recipe_of(
                autoencoder=recipe_of().autoencoder.model_dump()
                | {"training": {"num_steps": 1, "batch_size": 10**9, "lr": 0.1}}
            ),
            r"autoencoder.training.batch_size: at least .* smaller b",
        ),
    ],
)
def test_what_no_memory_holds_is_refused_with_what_to_change(recipe, words):
    with pytest.raises(ValueError, match=words):
        check_fits(recipe(), ROWS)


@pytest.mark.parametrize("name", ["quickstart", "ham10000", "dit", "ldm"])
def test_the_shipped_recipes_are_not_refused(name):
    check_fits(load_recipe(name, recipe_files()), ROWS)


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
