"""The settings of any captioner, and the file that a user writes them into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from derm_pipeline.captions.llava_next import LlavaNextConfig
from derm_pipeline.captions.openai_server import OpenAiConfig
from derm_pipeline.captions.visual import DescriptorConfig

CaptionerConfig = Annotated[DescriptorConfig | LlavaNextConfig | OpenAiConfig, Field(discriminator="kind")]
"""The settings of any captioner; `kind` says which."""

_KINDS: dict[str, type[BaseModel]] = {
    str(model.model_fields["kind"].default): model for model in (DescriptorConfig, LlavaNextConfig, OpenAiConfig)
}


def read_captioner_config(file: Path) -> CaptionerConfig:
    """The settings in a YAML file; those of the embedded descriptor where there is no such file.

    Raises:
        ValueError: it is not YAML, or no settings of a captioner; the message names file, key and what is allowed.
    """
    if not file.exists():
        return DescriptorConfig()
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{file}: not YAML ({what}{where})") from error
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        found = f"is {kind!r}" if isinstance(settings, dict) and "kind" in settings else "is missing"
        raise ValueError(f"{file}: kind {found}; it must be one of {', '.join(map(repr, _KINDS))}")
    adapter: TypeAdapter[CaptionerConfig] = TypeAdapter(CaptionerConfig)
    try:
        return adapter.validate_python(settings)
    except ValidationError as error:
        lines = [_complaint(dict(one), _KINDS[kind]) for one in error.errors()[:5]]
        raise ValueError("\n".join(f"{file}: {line}" for line in lines)) from error


def _complaint(one: dict[str, Any], model: type[BaseModel]) -> str:
    """One line: the key, and what is allowed there. What was given is not repeated: it may be a secret."""
    key = ".".join(str(part) for part in one["loc"])
    message = one["msg"].removeprefix("Value error, ")
    gate = model.model_fields.get("gate")
    at = gate.annotation if gate is not None and "gate" in one["loc"][1:-1] else model
    if one["type"] in ("extra_forbidden", "invalid_key") and isinstance(at, type) and issubclass(at, BaseModel):
        message = f"unknown key; allowed here: {', '.join(at.model_fields)}"
    elif one["type"] == "model_type":
        message = "a mapping of settings is expected"
    return f"{key}: {message}"
