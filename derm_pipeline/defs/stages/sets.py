"""Which rows a recipe learns from, watches its training on, and is judged on; and the pixels of such rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from derm_pipeline.defs.stages.beforehand import check_conditions
from derm_pipeline.defs.stages.data import CAPTIONS, HAIR, RECORDS, SPLITS, decode_mask, image_files
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Diagnosis, Split, canonical
from derm_pipeline.splits import light_dark_split
from derm_pipeline.store import Artifact, Build, Reference, Request

if TYPE_CHECKING:
    from derm_pipeline.images import Pixels
    from derm_pipeline.latents import ImageFile, Restore
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.training_set import Selection

TRAINING_SET, EVALUATION_SET = "training_set.parquet", "evaluation_set.parquet"
VALIDATION_SET = "validation_set.parquet"
TOLD = "told"
"""Column of the caption that a generator is told of an image, there where one is."""

CODE_VERSIONS = {"training_set": "1", "validation_set": "1", "evaluation_set": "1"}
"""Raised when a stage's result changes for the same inputs and settings; then that stage alone is made again."""

MOST_VALIDATED = 512
"""Images on which a training is watched, at most."""

OnProgress = Callable[[int, int], None]


def training_set(workspace: Workspace, name: str) -> Artifact:
    """The rows, captions and classes that the recipe's generator may see: train split only."""
    from derm_pipeline.training.training_set import diagnosis_counts, with_captions

    recipe, store = workspace.recipe(name), workspace.store
    style = recipe.training_set.caption
    captions, told = _captions(workspace, recipe, style), _told_captions(workspace, recipe)
    inputs = _inputs_by_source(workspace, recipe, "records") | captions.inputs | told.inputs
    inputs["splits"] = store.current("splits").reference
    settings = _selection_settings(recipe) | {"caption": style} | told.settings
    request = Request("training_set", name, inputs, settings, CODE_VERSIONS["training_set"])

    def make(build: Build) -> None:
        selected = rows_of(workspace, recipe, Split.TRAIN)
        rows = told.added_to(with_captions(selected.rows, captions.table()))
        check_conditions(recipe, rows)
        build.write_table(TRAINING_SET, rows)
        build.counts.update(
            num_images=rows.num_rows,
            diagnoses=diagnosis_counts(rows),
            left_out=dict(selected.left_out),
            joined=dict(selected.joined),
            rare_diagnoses=dict(selected.rare),
        )

    artifact = store.obtain(request, make)
    check_conditions(recipe, artifact.table(TRAINING_SET))  # it may have been made for other conditions
    return artifact


def evaluation_set(workspace: Workspace, name: str) -> Artifact:
    """The held-out rows of the recipe's sources: what it is judged on, and no stage of the generator reads."""
    from derm_pipeline.training.training_set import diagnosis_counts

    recipe, store = workspace.recipe(name), workspace.store
    inputs = _inputs_by_source(workspace, recipe, "records")
    inputs["splits"] = store.current("splits").reference
    request = Request("evaluation_set", name, inputs, _selection_settings(recipe), CODE_VERSIONS["evaluation_set"])

    def make(build: Build) -> None:
        named = recipe.training_set.diagnoses if recipe.training_set.min_images == 1 else ()
        learnt = named or canonical(rows_of(workspace, recipe, Split.TRAIN).rows["diagnosis"].to_pylist())
        found = {split: rows_of(workspace, recipe, split, learnt) for split in (Split.VAL, Split.TEST)}
        parts = {split: selection.rows for split, selection in found.items()}
        empty = [split.value for split, rows in parts.items() if rows.num_rows == 0]
        if empty:
            raise ValueError(f"no image of {', '.join(recipe.sources)} is in the split {empty[0]}: add lesions")
        tables = [
            rows.append_column("split", pa.array([split.value] * rows.num_rows, pa.string()))
            for split, rows in parts.items()
        ]
        build.write_table(EVALUATION_SET, pa.concat_tables(tables))
        build.counts.update(
            num_val=parts[Split.VAL].num_rows,
            num_test=parts[Split.TEST].num_rows,
            test_diagnoses=diagnosis_counts(parts[Split.TEST]),
            left_out={split.value: dict(selection.left_out) for split, selection in found.items()},
        )

    return store.obtain(request, make)


def validation_set(workspace: Workspace, name: str) -> Artifact:
    """Val rows on which a training is watched: at most `MOST_VALIDATED`, and of diagnoses that are learnt.

    Apart from `evaluation_set`, so that a changed test image trains nothing again. They are those of the smallest
    digests, so that few of them change when images are added. Nothing is chosen by them.
    """
    from derm_pipeline.training.training_set import diagnosis_counts

    recipe, store = workspace.recipe(name), workspace.store
    inputs = _inputs_by_source(workspace, recipe, "records")
    inputs["splits"] = store.current("splits").reference
    told = _told_captions(workspace, recipe)
    inputs |= told.inputs
    settings = _selection_settings(recipe) | {"most": MOST_VALIDATED} | told.settings
    request = Request("validation_set", name, inputs, settings, CODE_VERSIONS["validation_set"])

    def make(build: Build) -> None:
        learnt = canonical(rows_of(workspace, recipe, Split.TRAIN).rows["diagnosis"].to_pylist())
        rows = rows_of(workspace, recipe, Split.VAL, learnt).rows
        digests = rows["sha256"].to_pylist()
        chosen = sorted(sorted(range(len(digests)), key=digests.__getitem__)[:MOST_VALIDATED])
        rows = told.added_to(rows.take(pa.array(chosen, pa.int64())))
        build.write_table(VALIDATION_SET, rows)
        build.counts.update(num_images=rows.num_rows, num_val=len(digests), diagnoses=diagnosis_counts(rows))

    return store.obtain(request, make)


@dataclass(frozen=True)
class _Captions:
    """The captions of a style, of all images of a recipe's sources; of no style, none."""

    style: str | None
    artifacts: Mapping[str, Artifact]
    """By source."""

    @property
    def _place(self) -> tuple[str, str]:
        """The asset that holds them, and the column in it."""
        return ("visual_captions", "text") if self.style == "visual" else ("metadata_captions", str(self.style))

    @property
    def inputs(self) -> dict[str, Reference]:
        return {f"{self._place[0]}/{source}": artifact.reference for source, artifact in self.artifacts.items()}

    @property
    def settings(self) -> dict[str, object]:
        """What rows to which they were added as what is told depend on."""
        return {} if self.style is None else {TOLD: self.style}

    def table(self) -> pa.Table:
        """source, image_id, text."""
        names = ["source", "image_id", self._place[1]]
        texts = pa.concat_tables(artifact.table(CAPTIONS, names) for artifact in self.artifacts.values())
        return texts.rename_columns(["source", "image_id", "text"])

    def added_to(self, rows: pa.Table) -> pa.Table:
        """The rows with a column of what is told, where there are any."""
        from derm_pipeline.training.training_set import with_captions

        if self.style is None:
            return rows
        found = with_captions(rows, self.table())["text"] if rows.num_rows else pa.array([], pa.string())
        return rows.append_column(TOLD, found)


def _captions(workspace: Workspace, recipe: Recipe, style: str) -> _Captions:
    asset = "visual_captions" if style == "visual" else "metadata_captions"
    return _Captions(style, {source: workspace.store.current(asset, source) for source in recipe.sources})


def _told_captions(workspace: Workspace, recipe: Recipe) -> _Captions:
    """Those that the recipe's generator is told; none by most recipes."""
    style = recipe.told_caption
    return _Captions(None, {}) if style is None else _captions(workspace, recipe, style)


def _inputs_by_source(workspace: Workspace, recipe: Recipe, asset: str) -> dict[str, Reference]:
    return {f"{asset}/{source}": workspace.store.current(asset, source).reference for source in recipe.sources}


def _selection_settings(recipe: Recipe) -> dict[str, object]:
    deciding = {"split", "diagnoses"} | ({"min_images"} if recipe.training_set.min_images > 1 else set())
    config = recipe.training_set.model_dump(mode="json", include=deciding)
    return {"training_set": config, "sources": list(recipe.sources)}


def rows_of(
    workspace: Workspace, recipe: Recipe, split: Split, diagnoses: Sequence[Diagnosis] | None = None
) -> Selection:
    """The images of one split that the recipe uses; of these diagnoses, where some are given."""
    from derm_pipeline.training.training_set import select_rows

    config = recipe.training_set
    if diagnoses is not None:
        config = config.model_copy(update={"diagnoses": tuple(diagnoses), "min_images": 1})
    return select_rows(_records_of(workspace, recipe), splits_of(workspace, recipe), split, config)


def splits_of(workspace: Workspace, recipe: Recipe) -> pa.Table:
    """Which side every image of the recipe's sources is on, by the law that the recipe names."""
    if recipe.training_set.split == "light_dark":
        return light_dark_split(_records_of(workspace, recipe))
    return workspace.store.current("splits").table(SPLITS)


def _records_of(workspace: Workspace, recipe: Recipe) -> pa.Table:
    return pa.concat_tables(workspace.store.current("records", source).table(RECORDS) for source in recipe.sources)


def pixel_inputs(workspace: Workspace, recipe: Recipe) -> dict[str, Reference]:
    """What else than its rows decides an image's pixels: the hair masks, where the recipe removes hair."""
    return _inputs_by_source(workspace, recipe, "hair") if recipe.training_set.remove_hair else {}


def squares(workspace: Workspace, recipe: Recipe, rows: pa.Table, on_progress: OnProgress | None = None) -> Pixels:
    """The images of these rows as the recipe sees them: (n, size_px, size_px, 3) uint8."""
    return square_reader(workspace, recipe)(image_files(workspace, rows), on_progress)


def square_reader(workspace: Workspace, recipe: Recipe) -> Callable[[Sequence[ImageFile], OnProgress | None], Pixels]:
    """A function that reads image files as the recipe sees them."""
    from derm_pipeline.latents import read_squares

    config, restore = recipe.latents, _restore(workspace, recipe)

    def read(files: Sequence[ImageFile], on_progress: OnProgress | None = None) -> Pixels:
        return read_squares(
            files, size_px=config.size_px, geometry=config.geometry, restore=restore, on_progress=on_progress
        )

    return read


def _restore(workspace: Workspace, recipe: Recipe) -> Restore | None:
    if not recipe.training_set.remove_hair:
        return None
    from derm_pipeline.hair import remove_hair

    masks: dict[str, bytes] = {}
    for source in recipe.sources:
        table = workspace.store.current("hair", source).table(HAIR, ["sha256", "is_hairy", "mask_png"])
        masks |= {row["sha256"]: row["mask_png"] for row in table.to_pylist() if row["is_hairy"]}

    def restore(image: Pixels, sha256: str) -> Pixels:
        return remove_hair(image, decode_mask(masks[sha256])) if sha256 in masks else image

    return restore
