"""A generator of a pretrained base as a folder for other programs: adapters, learned tokens, weights, a model card.

Of the generator's own folder: `lora/<network>.safetensors`, `learned_embeds.safetensors` (and `_2`, of SDXL's second
text encoder), and `ema.safetensors` or `weights.safetensors` where the whole denoiser was trained.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from derm_pipeline.models.learned_embeddings import FILE, load_embeddings, save_each_embedding, save_embeddings
from derm_pipeline.models.lora import Lora
from derm_pipeline.models.lora_files import read_lora
from derm_pipeline.models.lora_forms import DIFFUSERS_WEIGHTS, Form, save_diffusers, save_kohya, save_peft
from derm_pipeline.models.lora_names import PARTS, Network, Part
from derm_pipeline.store import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from derm_pipeline.models.pretrained.config import PretrainedReference

Precision = Literal["float32", "float16", "bfloat16"]
"""In which weights are written."""

CARD, LORA = "README.md", "lora"
KOHYA_WEIGHTS = "lora.safetensors"
_EMBEDDINGS: dict[Part, str] = {"text_encoder": FILE, "text_encoder_2": "learned_embeds_2.safetensors"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Where a generator comes from, as its card says it."""

    recipe: str
    title: str
    artifact: str
    """asset/partition/key of the generator, for `derm lineage`."""
    licences: Sequence[str]
    """Of the sources that it was trained on, with their names."""
    training: Mapping[str, Any]
    """Its settings."""


@dataclass(frozen=True)
class Contents:
    """What was learnt, as a generator's folder holds it."""

    base: PretrainedReference
    loras: Mapping[Part, Lora]
    networks: Mapping[Part, Network]
    embeddings: Mapping[Part, Mapping[str, Tensor]]
    weights: Path | None
    """Of the whole denoiser, where all of it was trained."""


def export_generator(
    folder: Path, out: Path, form: Form, origin: Origin, *, dtype: Precision | None = None
) -> list[Path]:
    """Write what a generator learnt in the form of other programs; returns the files, by their paths in `out`.

    diffusers: `pytorch_lora_weights.safetensors`, `unet/` or `transformer/` if all of it was trained. peft: a folder
    for each network. kohya: `lora.safetensors`. In each form learned tokens, in one file and one by one, and a card.

    Args:
        folder: The generator's.
        out: The folder, which must be empty or not there; it is there when all is written.
        form: Whose form.
        origin: For the card.
        dtype: In which weights are written; None is as they are.

    Raises:
        FileNotFoundError: the base is needed for its configuration and is not where it was.
        ValueError: the generator is not of a pretrained base, has nothing to export or nothing that this form can
            hold; or `out` holds other files.
    """
    import torch

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds other files: choose an empty folder, or one that does not exist yet")
    contents = read_contents(folder)
    _check_form(contents, form)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, contents, form, getattr(torch, dtype) if dtype else None)
        (partial / CARD).write_text(model_card(contents, form, origin))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())


def read_contents(folder: Path) -> Contents:
    """What was learnt, of a generator's folder.

    Raises:
        ValueError: it is of no pretrained base, or holds nothing that was learnt.
    """
    from derm_pipeline.models.generator import GeneratorSpec
    from derm_pipeline.models.pretrained.config import PretrainedNetworkConfig

    network = GeneratorSpec.load(folder).network
    if not isinstance(network, PretrainedNetworkConfig):
        raise ValueError(f"the generator in {folder} is a {network.kind} that was trained here, of no pretrained base")
    files = {part: folder / LORA / f"{part}.safetensors" for part in PARTS}
    read = {part: read_lora(path) for part, path in files.items() if path.is_file()}
    for part, file in read.items():
        if file.form != "peft" or "network" not in file.networks:
            raise ValueError(f"{files[part]} was not written by `save_lora`")
    tables = {part: folder / name for part, name in _EMBEDDINGS.items() if (folder / name).is_file()}
    weights = [folder / name for name in ("ema.safetensors", "weights.safetensors") if (folder / name).is_file()]
    if not (read or tables or weights):
        raise ValueError(f"{folder} holds neither {LORA}/, {FILE} nor weights: nothing was learnt")
    return Contents(
        base=network.base,
        loras={part: file.parts["network"] for part, file in read.items()},
        networks={part: file.networks["network"] for part, file in read.items()},
        embeddings={part: load_embeddings(path) for part, path in tables.items()},
        weights=weights[0] if weights else None,
    )


def _check_form(contents: Contents, form: Form) -> None:
    if contents.weights is not None and form != "diffusers":
        raise ValueError(f"the whole denoiser was trained, and the {form} form holds adapters only: take diffusers")
    if contents.loras and form == "diffusers" and contents.base.family == "pixart":
        raise ValueError("diffusers' PixArt pipelines read no LoRA files: take peft")
    if not contents.loras and contents.weights is None and form == "peft":
        raise ValueError("only tokens were learnt, which peft has no form for: take diffusers")


def _write(out: Path, contents: Contents, form: Form, dtype: Any) -> None:
    loras, networks = contents.loras, contents.networks
    if loras and form == "diffusers":
        save_diffusers(out / DIFFUSERS_WEIGHTS, loras, networks, dtype=dtype)
    elif loras and form == "kohya":
        save_kohya(out / KOHYA_WEIGHTS, loras, networks, is_sdxl=contents.base.family == "sdxl", dtype=dtype)
    elif loras:
        for part, lora in loras.items():
            save_peft(out / part, lora, base=_base_id(contents.base) or "", dtype=dtype)
    for part, embeddings in contents.embeddings.items():
        save_embeddings(out / _EMBEDDINGS[part], embeddings)
        save_each_embedding(out / Path(_EMBEDDINGS[part]).stem, embeddings)
    if contents.weights is not None:
        _write_denoiser(out, contents, dtype)


def _write_denoiser(out: Path, contents: Contents, dtype: Any) -> None:
    """The whole denoiser as a folder that diffusers' `from_pretrained` reads."""
    from safetensors.torch import load_file, save_file

    from derm_pipeline.models.pretrained.files import DENOISER_FOLDERS, find_base

    assert contents.weights is not None
    name = DENOISER_FOLDERS[contents.base.family]
    config = find_base(contents.base.settings).config(name)
    state = load_file(contents.weights)
    (out / name).mkdir()
    cast = {key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in state.items()}
    save_file(cast, out / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_json(out / name / "config.json", config)


def _base_id(base: PretrainedReference) -> str | None:
    """The base's name on the hub; None for files here, whose path is nobody else's business."""
    model = base.settings.model
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def model_card(contents: Contents, form: Form, origin: Origin) -> str:
    """The README of an exported generator, with the front matter that hubs read."""
    import yaml

    base, hub_id = contents.base, _base_id(contents.base)
    called = hub_id or Path(base.settings.model).name
    front = {
        "library_name": "peft" if form == "peft" else "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "tags": ["dermatology", "synthetic", *(["lora"] if contents.loras else [])],
    } | ({"base_model": hub_id} if hub_id else {})
    revision = f", revision {base.settings.revision}" if base.settings.revision else ""
    training = {key: value for key, value in origin.training.items() if key != "base"}
    return f"""---
{yaml.safe_dump(front, sort_keys=True)}---
# {origin.title}

{_sentences(contents)} Made by `derm_pipeline`, recipe `{origin.recipe}`; `derm lineage {origin.artifact}` walks to the
source files.

**Base**: {called} ({base.family}{revision}). Its licence is not known here: see where it was published. What you make
with this stands under it, too.

**Sources**: {"; ".join(origin.licences)}. Use it under terms that all of them allow.

**Figures**: n/a in this folder. `derm report {origin.recipe}` has those of the recipe's samples: who they help, whom
they fail, and whether they are copies.

Not for diagnosing anybody: what it draws is what it learnt, nobody's skin.

## Use

{_usage(contents, form, called)}
## Training

```yaml
{yaml.safe_dump(training, sort_keys=False, default_flow_style=None, width=100)}```
"""


def _sentences(contents: Contents) -> str:
    """What the folder holds, counted."""
    said = []
    for part, lora in contents.loras.items():
        ranks = sorted({layer.rank for layer in lora.layers.values()})
        kind = "DoRA" if lora.dora else "LoRA"
        said.append(f"{kind} of rank {', '.join(map(str, ranks))} on {len(lora.layers)} layers of the {part}.")
    for part, embeddings in contents.embeddings.items():
        tokens = ", ".join(f"`{token}`" for token in embeddings)
        said.append(f"Learned tokens of the {part}: {tokens}.")
    if contents.weights is not None:
        said.append("All weights of the denoiser" + (", averaged." if contents.weights.stem == "ema" else "."))
    return " ".join(said)


def _usage(contents: Contents, form: Form, base: str) -> str:
    """How other programs read the folder."""
    from derm_pipeline.models.pretrained.files import DENOISER_FOLDERS

    denoiser = DENOISER_FOLDERS[contents.base.family]
    lines = ["from diffusers import DiffusionPipeline"]
    lines += ["from peft import PeftModel"] if contents.loras and form == "peft" else []
    lines += [f'pipeline = DiffusionPipeline.from_pretrained("{base}")']
    if contents.weights is not None:
        lines.append(f'pipeline.{denoiser} = type(pipeline.{denoiser}).from_pretrained("{denoiser}")')
    for part in contents.embeddings:
        suffix = part.removeprefix("text_encoder")
        lines += [
            f'for path in pathlib.Path("{Path(_EMBEDDINGS[part]).stem}").iterdir():',
            f"    networks = dict(text_encoder=pipeline.{part}, tokenizer=pipeline.tokenizer{suffix})",
            "    pipeline.load_textual_inversion(str(path), **networks)",
        ]
    lines = (["import pathlib"] if contents.embeddings else []) + lines
    if contents.loras and form == "peft":
        for part in contents.loras:
            name = denoiser if part == "denoiser" else part
            lines.append(f'pipeline.{name} = PeftModel.from_pretrained(pipeline.{name}, "{part}")')
    elif contents.loras:
        file = DIFFUSERS_WEIGHTS if form == "diffusers" else KOHYA_WEIGHTS
        lines.append(f'pipeline.load_lora_weights(".", weight_name="{file}")')
    code = "\n".join(lines)
    dora = any(lora.dora for lora in contents.loras.values())
    note = (
        "This is DoRA: its magnitudes are `dora_scale`, one an output. **diffusers leaves them out and draws something "
        "else**, and other programs may; export as peft or diffusers for what the generator draws.\n"
        if dora
        else ""
    )
    return f"```python\n{code}\n```\n" + (note if form == "kohya" else "")
