"""The file of a captioner's settings: each mistake gives one line that names file, key and what is allowed."""

from __future__ import annotations

import pytest
import yaml

from derm_pipeline.captions.gate import GateConfig
from derm_pipeline.captions.llava_next import LlavaNextConfig
from derm_pipeline.captions.openai_server import OpenAiConfig
from derm_pipeline.captions.settings import read_captioner_config
from derm_pipeline.captions.visual import DescriptorConfig

LEAST = {
    DescriptorConfig: {"kind": "descriptor"},
    LlavaNextConfig: {"kind": "llava_next"},
    OpenAiConfig: {"kind": "openai", "base_url": "http://127.0.0.1/v1", "model": "m"},
}


@pytest.fixture
def complaint(tmp_path):
    """What is said of a file with this text, less the file's name."""
    file = tmp_path / "captioner.yaml"

    def of(text):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"captioner\.yaml: ") as caught:
            read_captioner_config(file)
        lines = str(caught.value).splitlines()
        assert all(line.startswith(f"{file}: ") for line in lines)
        return "\n".join(line.removeprefix(f"{file}: ") for line in lines)

    return of


def test_no_file_is_the_embedded_descriptor_and_every_kind_is_read(tmp_path):
    file = tmp_path / "captioner.yaml"
    assert read_captioner_config(file) == DescriptorConfig()
    for model, settings in LEAST.items():
        file.write_text(yaml.safe_dump(settings))
        assert read_captioner_config(file) == model(**settings)


@pytest.mark.parametrize("text", ["", "[]", "5", "descriptor", "model: x", "kind:", "kind: llava", "kind: [a]"])
def test_a_file_that_names_no_captioner_is_told_which_there_are(complaint, text):
    assert complaint(text).startswith("kind is ")
    assert complaint(text).endswith("; it must be one of 'descriptor', 'llava_next', 'openai'")
    assert "\n" not in complaint(text)


@pytest.mark.parametrize(("model", "name"), [(model, name) for model in LEAST for name in model.model_fields])
def test_a_wrong_value_of_any_key_names_the_key(complaint, model, name):
    found = complaint(yaml.safe_dump(LEAST[model] | {name: [None]}))
    assert name in found.split(":")[0]
    assert "\n" not in found


@pytest.mark.parametrize("name", list(GateConfig.model_fields))
def test_a_wrong_value_of_the_gate_names_the_key(complaint, name):
    assert complaint(f"kind: llava_next\ngate: {{{name}: -1}}").startswith(f"llava_next.gate.{name}: Input should be")


@pytest.mark.parametrize("model", list(LEAST))
def test_an_unknown_key_is_told_the_known_ones(complaint, model):
    found = complaint(yaml.safe_dump(LEAST[model] | {"temprature": 1}))
    assert found.startswith(f"{LEAST[model]['kind']}.temprature: unknown key; allowed here: ")
    assert found.split("allowed here: ")[1].split(", ") == list(model.model_fields)


def test_an_unknown_key_of_the_gate_is_told_those_of_the_gate(complaint):
    found = complaint("kind: llava_next\ngate: {min_word: 3}")
    assert found == f"llava_next.gate.min_word: unknown key; allowed here: {', '.join(GateConfig.model_fields)}"
    assert complaint("kind: llava_next\ngate:\n") == "llava_next.gate: a mapping of settings is expected"


def test_what_is_no_yaml_is_said_with_the_line(complaint):
    assert complaint("kind: llava_next\n  model: x") == "not YAML (mapping values are not allowed here in line 2)"
    assert complaint("kind: !!python/object:os.system x").startswith("not YAML (could not determine a constructor")
    assert complaint(b"kind: \xff").startswith("not YAML (")


def test_a_key_that_was_written_into_the_file_is_not_repeated(complaint):
    least = "kind: openai\nbase_url: http://127.0.0.1/v1\nmodel: m\n"
    for line in ("api_key: sk-secret", "api_key_env: sk-secret", "base_url: http://user:sk-secret@127.0.0.1/v1"):
        assert "secret" not in complaint(least.replace("base_url: http://127.0.0.1/v1\n", "") + line)
