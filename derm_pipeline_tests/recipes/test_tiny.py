"""Recipes of a pretrained base in miniature: what is written, what stays, what is refused."""

import pytest
import yaml

from derm_pipeline.models.pretrained import tiny as tiny_bases
from derm_pipeline.recipes import RecipeError, load_recipe, recipe_files
from derm_pipeline.recipes.tiny import write_tiny_recipe
from derm_pipeline.sources import SOURCES

FAMILIES = {
    "lesiongen_lora": "sd",
    "lesiongen_full": "sd",
    "skin_diff": "sd",
    "melanoma_sdxl": "sdxl",
    "med_art": "pixart",
    "med_art_derm": "pixart",
}


@pytest.fixture
def written(monkeypatch):
    """The bases that were written, as (family, folder), in the place of their files."""
    made = []

    def write(family, folder):
        made.append((family, folder))
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")

    monkeypatch.setattr(tiny_bases, "write_tiny", write)
    return made


def write(name, data, there=()):
    return write_tiny_recipe(name, recipe_files([data / "recipes"]), data, known=SOURCES, there=there)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_in_miniature_differs_in_base_sizes_budgets_and_counts_only(name, tmp_path, written):
    path = write(name, tmp_path)
    assert path == tmp_path / "recipes" / f"{name}_tiny.yaml"
    folder = tmp_path / "models" / "tiny" / FAMILIES[name]
    assert written == [(FAMILIES[name], folder)]
    files = recipe_files([tmp_path / "recipes"])
    recipe, small = load_recipe(name, files), load_recipe(f"{name}_tiny", files)
    assert small.generator.base.model == str(folder)
    assert (small.generator.base.family, small.sources) == (FAMILIES[name], ("phantom",))
    assert small.training_set == recipe.training_set
    assert small.latents.size_px == 64
    assert (small.latents.geometry, small.latents.orientations) == (
        recipe.latents.geometry,
        recipe.latents.orientations,
    )
    assert [stage.kind for stage in small.generator.stages] == [stage.kind for stage in recipe.generator.stages]
    for stage, own in zip(small.generator.stages, recipe.generator.stages, strict=True):
        assert stage.model_dump(exclude={"training"}) == own.model_dump(exclude={"training"})
        assert stage.training.steps <= 60
        assert stage.training.optimizer == "adamw"
        assert stage.training.decays == own.training.decays
    assert (small.generator.hldf is None) == (recipe.generator.hldf is None)
    assert type(small.synthetic_dataset) is type(recipe.synthetic_dataset)
    assert small.classifiers.arms == recipe.classifiers.arms


def test_images_are_drawn_only_where_the_recipes_own_are_not_there_and_the_file_says_so(tmp_path, written):
    text = write("skin_diff", tmp_path).read_text()
    assert "fitz_subset is not there" in text
    assert yaml.safe_load(text)["sources"] == ["phantom"]
    text = write("med_art", tmp_path, there=["kvasir"]).read_text()
    assert "the images are those of med_art" in text
    assert "sources" not in yaml.safe_load(text)
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_there_is_left_as_it_is(tmp_path, written):
    path = write("med_art", tmp_path)
    own = path.read_text().replace("num_samples: 70", "num_samples: 16")
    path.write_text(own)
    assert write("med_art", tmp_path) == path
    assert path.read_text() == own
    assert len(written) == 1


@pytest.mark.parametrize("name", ["quickstart", "dit"])
def test_a_recipe_without_a_base_is_refused(name, tmp_path, written):
    with pytest.raises(RecipeError, match=rf"{name}.yaml: starts from no pretrained base .*derm run {name}"):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not written
