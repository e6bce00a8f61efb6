"""`derm export`, on a generator's folder made by hand."""

import pytest
import torch
from click.testing import CliRunner

from derm_pipeline.cli import main
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.lora import LoraConfig, add_lora
from derm_pipeline.models.lora_files import read_lora, save_lora
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.models.pretrained.tiny import write_tiny
from derm_pipeline.store import Request
from derm_pipeline_tests.conftest import new_project


@pytest.fixture
def project(tmp_path):
    return new_project(tmp_path / "project")


def make_generator(project, folder):
    base = load_base(PretrainedConfig(model=str(write_tiny("sd", folder)), dtype="float32"))
    add_lora(base.denoiser, LoraConfig(rank=2, targets=("to_q",)))

    def make(build):
        save_lora(build.path("lora/denoiser.safetensors"), base.denoiser)
        GeneratorSpec(
            network=base.network_config(latent_size=8),
            law=base.law,
            classes={},
            latent_mean=(0.0,) * 4,
            latent_std=(1.0,) * 4,
        ).save(build.directory)

    settings = {"generator": {"kind": "pretrained", "stages": [{"kind": "lora", "rank": 2}]}}
    return project.workspace.store.obtain(Request("generator", "tiny", {}, settings, "1"), make)


def derm(project, *arguments):
    return CliRunner().invoke(main, [*map(str, arguments), "--data", str(project.data), "--raw", str(project.raw)])


def test_it_writes_the_generator_with_a_card_and_lists_the_files(project, tmp_path):
    artifact = make_generator(project, tmp_path / "base")
    result = derm(project, "export", "tiny", tmp_path / "out", "--format", "kohya", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "2 files (kohya)" in result.output
    file = read_lora(tmp_path / "out" / "lora.safetensors")
    assert file.form == "kohya"
    assert {layer.down.dtype for layer in file.parts["denoiser"].layers.values()} == {torch.float16}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"derm lineage {artifact.reference}" in card
    assert "rank: 2" in card
    source = project.workspace.sources["phantom"]
    assert f"{source.title}: {source.licence}" in card


def test_what_is_not_finished_or_not_empty_is_one_clear_line(project, tmp_path):
    result = derm(project, "export", "tiny", tmp_path / "out", "--format", "peft")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["derm: generator/tiny is not a finished artifact: materialise it first"]
    make_generator(project, tmp_path / "base")
    result = derm(project, "export", "tiny", tmp_path / "base", "--format", "peft")
    assert result.exit_code == 1
    assert "holds other files: choose an empty folder" in result.stderr
