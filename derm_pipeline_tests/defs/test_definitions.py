"""The graph as a literal, and what every asset of it must have."""

import subprocess
import sys

import dagster as dg
import pytest

from derm_pipeline.defs.assets.shared import GPU_POOL
from derm_pipeline.defs.build import build_defs
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.sources import SOURCES
from derm_pipeline_tests.conftest import TINY

GRAPH = {
    "raw_images": set(),
    "records": {"raw_images"},
    "hair": {"records"},
    "descriptors": {"records", "hair"},
    "visual_captions": {"records", "hair", "descriptors"},
    "metadata_captions": {"records", "hair", "descriptors"},
    "splits": {"records"},
    "training_set": {"records", "hair", "metadata_captions", "visual_captions", "splits"},
    "evaluation_set": {"records", "splits"},
    "validation_set": {"records", "metadata_captions", "visual_captions", "splits"},
    "autoencoder": {"training_set", "validation_set"},
    "latents": {"training_set", "validation_set", "autoencoder"},
    "generator": {"training_set", "validation_set", "latents"},
    "synthetic_dataset": {"training_set", "autoencoder", "generator"},
    "classifiers": {"training_set", "evaluation_set", "synthetic_dataset"},
    "fidelity": {"training_set", "evaluation_set", "synthetic_dataset", "classifiers", "autoencoder"},
    "group_metrics": {"classifiers"},
    "report": {
        "training_set",
        "evaluation_set",
        "autoencoder",
        "generator",
        "synthetic_dataset",
        "classifiers",
        "fidelity",
        "group_metrics",
    },
    "leaderboard": {"report"},
}

GROUPS = {
    "1_sources": {"raw_images", "records", "hair"},
    "2_captions": {"descriptors", "metadata_captions", "visual_captions"},
    "3_splits": {"splits", "training_set", "evaluation_set", "validation_set"},
    "4_generator": {"autoencoder", "latents", "generator"},
    "5_samples": {"synthetic_dataset"},
    "6_evaluation": {"classifiers", "fidelity", "group_metrics"},
    "7_reports": {"report", "leaderboard"},
}

CHECKS = {
    ("records", "every_image_has_one_row"): True,
    ("records", "no_file_is_quarantined"): False,
    ("records", "every_label_means_a_diagnosis"): False,
    ("metadata_captions", "captions_name_no_unknown"): True,
    ("visual_captions", "every_image_is_described"): True,
    ("splits", "no_lesion_in_two_splits"): True,
    ("splits", "no_near_duplicate_in_two_splits"): False,
    ("training_set", "nothing_held_out_is_trained_on"): True,
    ("autoencoder", "images_come_back"): True,
    ("latents", "moments_are_finite"): True,
    ("synthetic_dataset", "every_sample_tells_where_it_came_from"): True,
    ("classifiers", "samples_show_what_was_asked_for"): False,
    ("fidelity", "samples_are_not_copies"): False,
}
"""Every check, and whether it blocks what is downstream."""

GPU = {"autoencoder", "latents", "generator", "synthetic_dataset", "classifiers"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "recipes").mkdir()
    (data / "recipes" / "tiny.yaml").write_text(TINY)
    (data / "sources.yaml").write_text("moles: {kind: imagefolder, licence: CC0, title: My moles}\n")
    return Workspace(data=data, raw=data / "raw")


@pytest.fixture(scope="module")
def definitions(workspace):
    return build_defs(workspace)


@pytest.fixture(scope="module")
def specs(definitions):
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


def test_the_definitions_can_be_loaded(definitions):
    dg.Definitions.validate_loadable(definitions)


def test_the_graph_is_the_one_that_was_designed(specs):
    assert {name: {dep.asset_key.to_user_string() for dep in spec.deps} for name, spec in specs.items()} == GRAPH


def test_every_asset_has_its_group_an_owner_a_kind_and_words(specs):
    assert {group: {name for name, spec in specs.items() if spec.group_name == group} for group in GROUPS} == GROUPS
    for name, spec in specs.items():
        assert spec.description, name
        if name != "raw_images":  # dagster gives an observed source none
            assert spec.owners == ["team:derm_pipeline"], name
            assert spec.kinds, name
            assert spec.code_version, name


def test_the_heavy_assets_share_one_pool(definitions):
    graph = definitions.resolve_asset_graph()
    pools = {
        key.to_user_string(): graph.get(key).pools for key in graph.materializable_asset_keys if graph.get(key).pools
    }
    assert pools == {name: {GPU_POOL} for name in GPU}


def test_the_checks_are_there_and_block_where_they_must(definitions):
    graph = definitions.resolve_asset_graph()
    found = {
        (key.asset_key.to_user_string(), key.name): graph.get_check_spec(key).blocking for key in graph.asset_check_keys
    }
    assert found == CHECKS


def test_sources_and_recipes_are_partitions_and_every_recipe_is_a_job(definitions, specs, workspace):
    gpu = ["dit", "dit_b", "dit_scin", "dit_text", "dit_xl", "ldm", "ldm_scin"]
    gpu += ["lesiongen_full", "lesiongen_lora", "med_art", "med_art_derm", "melanoma_sdxl", "skin_diff"]
    recipes = sorted([*gpu, "ham10000", "ham10000_fast", "ham10000_hour", "quickstart", "tiny"])
    assert sorted(workspace.recipe_files) == recipes
    keys = {
        name: tuple(spec.partitions_def.get_partition_keys()) if spec.partitions_def else ()
        for name, spec in specs.items()
    }
    of_sources = {"raw_images", "records", "hair", "descriptors", "metadata_captions", "visual_captions"}
    of_none = {"splits", "leaderboard"}
    assert {name for name, found in keys.items() if found == (*SOURCES, "moles")} == of_sources
    assert {name for name, found in keys.items() if found == ()} == of_none
    assert {name for name, found in keys.items() if found == tuple(recipes)} == set(GRAPH) - of_sources - of_none
    assert {job.name for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")} == set(recipes)


def test_a_source_is_upstream_of_the_recipes_that_name_it(definitions):
    graph = definitions.resolve_asset_graph()
    mapping = graph.get_partition_mapping(dg.AssetKey("training_set"), dg.AssetKey("records"))
    partitions = {key: graph.get(dg.AssetKey(key)).partitions_def for key in ("training_set", "records")}

    def upstream(recipe):
        chosen = partitions["training_set"].subset_with_partition_keys([recipe])
        found = mapping.get_upstream_mapped_partitions_result_for_partitions(
            chosen, partitions["training_set"], partitions["records"]
        )
        return set(found.partitions_subset.get_partition_keys())

    assert upstream("tiny") == upstream("quickstart") == {"phantom"}
    assert upstream("ham10000_fast") == {"ham10000"}


def test_importing_the_definitions_imports_nothing_heavy():
    program = (
        "import sys; import derm_pipeline.definitions; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'diffusers', 'transformers', 'sklearn', 'matplotlib', 'datasets'}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_importing_the_command_line_imports_neither_dagster_nor_torch():
    program = "import sys; import derm_pipeline.cli; print(*({'torch', 'dagster', 'pandas'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
