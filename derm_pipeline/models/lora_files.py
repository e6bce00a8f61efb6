"""LoRA files, read by what they themselves show: peft's form, diffusers' and kohya's; and our own, written.

Safetensors only. A file is data from anywhere: its names must be those of the network, its shapes must fit, its
configuration is read for numbers alone, and nothing of it is taken where anything is wrong. `lora_forms` writes the
forms of other programs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from derm_pipeline.models.lora import Lora, LoraLayer, adaptable, fit_lora, put_lora, some, take_lora
from derm_pipeline.models.lora_forms import (
    CONFIG,
    DIFFUSERS_WEIGHTS,
    NETWORK,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Form,
    save_raw,
)
from derm_pipeline.models.lora_metadata import SaidOfLora, positive_number
from derm_pipeline.models.lora_names import DIFFUSERS_PREFIXES, KOHYA_PREFIXES, Network, Part, aliases, network_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_MAX_CONFIG_BYTES = 8 << 20
_MAX_TENSORS = 50_000
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "scale",
    ".alpha": "alpha",
}
"""How a tensor's name ends, in all three forms, and what it is."""
_OLD_ATTENTION = re.compile(r"(?P<where>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora(?=\.(?:down|up)\.weight$)")
"""Of diffusers before it had peft."""
_OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "oft_", "diff", "lora_embedding")


@dataclass(frozen=True)
class LoraFile:
    """What a file holds; its layers as the file calls them."""

    form: Form
    parts: Mapping[str, Lora]
    """By network; of peft's form, which does not tell, under "network"."""
    networks: Mapping[str, Network]
    """What the file itself tells of them; ours do."""


def save_lora(path: Path, module: nn.Module, name: str = "default") -> None:
    """Write the adapter of one network in peft's form: its own names, its configuration as metadata.

    diffusers reads it, too: `module.load_lora_adapter(path, prefix=None, use_safetensors=True)`; without the last it
    leaves out the configuration, and alpha with it.
    """
    save_raw(path, take_lora(module, name), network_of(module))


def load_lora(
    path: Path,
    modules: nn.Module | Mapping[Part, nn.Module],
    name: str = "default",
    *,
    alpha: float | None = None,
    ignore: Collection[Part] = (),
) -> dict[Part, Lora]:
    """Put the adapters of a file, of any of the three forms, into networks: all of them or none.

    Args:
        path: `.safetensors`, or a folder as peft (`adapter_config.json`) or diffusers
            (`pytorch_lora_weights.safetensors`) write it.
        modules: The networks, or the denoiser alone. A file of peft's form holds one network: give one.
        name: What the adapters are called there.
        alpha: For a file that does not tell it; see `read_lora`.
        ignore: Networks whose adapters may stay in the file.

    Returns:
        What was put into each network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no LoRA, or one that does not fit: the names or shapes that differ; or it has adapters for a
            network that was not given. The networks are as they were.
    """
    given: dict[Part, nn.Module] = dict(modules) if isinstance(modules, Mapping) else {"denoiser": modules}
    parts = _for_these(read_lora(path, alpha=alpha), given, ignore, path)
    fitted = {
        part: fit_lora(given[part], _renamed(lora, given[part], f"{path}: {part}"), name, where=f"{path}: {part}")
        for part, lora in parts.items()
    }
    for part, lora in fitted.items():
        put_lora(given[part], lora, name)
    return fitted


def read_lora(path: Path, *, alpha: float | None = None) -> LoraFile:
    """What a file or folder holds, its form told by its names; see `load_lora`.

    A file of diffusers' or kohya's form that tells no alpha means alpha = rank; one of peft's form must tell it, in
    its metadata or in the `adapter_config.json` beside it, or `alpha` must.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no LoRA, one of another kind, incomplete, or its configuration contradicts its tensors.
    """
    file, config = _find(path)
    tensors, metadata = _tensors(file)
    form = _form_of(tensors, file)
    if config is None and CONFIG in metadata:
        config = _json_object(metadata[CONFIG], f"the metadata of {file}")
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, layer, role = _place(key, form)
        roles = grouped.setdefault(part, {}).setdefault(layer, {})
        if role in roles:
            raise ValueError(f"{file} holds {role} of {layer} twice")
        roles[role] = tensor
    parts = {}
    for part, layers in grouped.items():
        own = {"peft": config, "diffusers": _of_part(config, part), "kohya": None}[form]
        default = alpha if alpha or form == "peft" else "rank"
        parts[part] = _lora(layers, own, default, f"{file}: {part}")
    return LoraFile(form, parts, _networks(metadata, file))


def _for_these(
    file: LoraFile, given: Mapping[Part, nn.Module], ignore: Collection[Part], path: Path
) -> dict[Part, Lora]:
    """The adapters of the networks that were given."""
    if "network" in file.parts:
        if len(given) != 1:
            raise ValueError(f"{path} holds the adapter of one network and does not tell of which: give one network")
        return {next(iter(given)): file.parts["network"]}
    unasked = [part for part in file.parts if part not in given and part not in ignore]
    if unasked:
        raise ValueError(f"{path} also has adapters for {' and '.join(unasked)}: give that network, or ignore it")
    wanted = {part: file.parts[part] for part in given if part in file.parts}
    if not wanted:
        raise ValueError(f"{path} has adapters for {', '.join(file.parts)} only, not for {', '.join(given)}")
    return wanted


def _renamed(lora: Lora, module: nn.Module, where: str) -> Lora:
    """An adapter with the network's own names for its layers; those that it does not know stay."""
    known = aliases(adaptable(module), network_of(module))
    layers: dict[str, LoraLayer] = {}
    for name, layer in lora.layers.items():
        own = known.get(name, name)
        if own in layers:
            raise ValueError(f"{where} has {own} under two names, of which {name} is one")
        layers[own] = layer
    return replace(lora, layers=layers)


def _find(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file with the weights, and peft's configuration where it lies beside them."""
    if path.is_dir():
        there = [path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"the folder {path} has neither {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}")
        path = there[0]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; other weights can run code when they are read")
    beside = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_WEIGHTS or not beside.is_file():
        return path, None
    if beside.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{beside} is larger than any configuration of an adapter")
    return path, _json_object(beside.read_text(), str(beside))


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no configuration of an adapter")
    return found


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata; names are looked at before any tensor is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            _check_names(names, file)
            return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or a broken one: {error}") from None


def _check_names(names: list[str], file: Path) -> None:
    if len(names) > _MAX_TENSORS:
        raise ValueError(f"{file} holds {len(names):,} tensors; no LoRA has more than {_MAX_TENSORS:,}")
    strange = [name for name in names if not _OLD_ATTENTION.match(name) and not name.endswith(tuple(_ENDINGS))]
    other = [name for name in strange if any(kind in name for kind in _OTHER_KINDS)]
    if other:
        raise ValueError(f"{file} is an adapter of another kind than LoRA and DoRA, by {some(other)}; it is not read")
    if strange or not names:
        raise ValueError(f"{file} is no LoRA: it holds {some(strange) or 'nothing'}")


def _form_of(names: Collection[str], file: Path) -> Form:
    told = {
        "kohya": [name for name in names if name.startswith(tuple(KOHYA_PREFIXES))],
        "diffusers": [name for name in names if name.split(".", 1)[0] in DIFFUSERS_PREFIXES],
    }
    forms: tuple[Form, ...] = ("kohya", "diffusers")
    for form in forms:
        if len(told[form]) == len(names):
            return form
        if told[form]:
            rest = [name for name in names if name not in set(told[form])]
            raise ValueError(f"{file} is of no one form: {told[form][0]} is {form}'s, and {some(rest)} is not")
    return "peft"


def _place(key: str, form: Form) -> tuple[str, str, str]:
    """The network, the layer and the role of a tensor, by its name."""
    part = "network"
    if form == "kohya":
        prefix = next(prefix for prefix in KOHYA_PREFIXES if key.startswith(prefix))
        part, key = KOHYA_PREFIXES[prefix], key.removeprefix(prefix)
    elif form == "diffusers":
        prefix, _, key = key.partition(".")
        part = DIFFUSERS_PREFIXES[prefix]
    key = _of_today(key.removeprefix(PEFT_PREFIX))
    ending = next(ending for ending in _ENDINGS if key.endswith(ending))
    return part, key.removesuffix(ending), _ENDINGS[ending]


def _of_today(key: str) -> str:
    """A name of diffusers before it had peft, as it would be now."""
    found = _OLD_ATTENTION.match(key)
    if not found:
        return key
    where, which, rest = found["where"], found["which"], key[found.end() :]
    if where.endswith("self_attn"):
        return f"{where}.{which}_proj.lora{rest}"
    return f"{where}.to_{'out.0' if which == 'out' else which}.lora{rest}"


def _of_part(config: Mapping[str, Any] | None, part: str) -> dict[str, Any] | None:
    """The configuration of one network, out of a file's."""
    prefixes = [f"{prefix}." for prefix, told in DIFFUSERS_PREFIXES.items() if told == part]
    own = {
        key.removeprefix(prefix): value
        for prefix in prefixes
        for key, value in (config or {}).items()
        if key.startswith(prefix)
    }
    return own or None


def _networks(metadata: Mapping[str, str], file: Path) -> dict[str, Network]:
    if NETWORK not in metadata:
        return {}
    try:
        return {"network": Network.model_validate_json(metadata[NETWORK])}
    except ValidationError:
        raise ValueError(f"the metadata {NETWORK} of {file} is none that we wrote") from None


def _lora(
    layers: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] | None, alpha: float | str | None, where: str
) -> Lora:
    """One network's adapter, of its tensors by layer and role and of its configuration.

    Args:
        layers: "down", "up", perhaps "alpha" and "magnitude" of each layer.
        config: peft's, as somebody wrote it.
        alpha: Where neither tells it; "rank": the rank; None: that is an error.
        where: Begins a message.
    """
    settings = SaidOfLora(config, where)
    found = {}
    for name, roles in layers.items():
        missing = [role for role in ("down", "up") if role not in roles]
        if missing:
            raise ValueError(f"{where}: {name} is not complete: {missing[0]} is missing")
        down = roles["down"]
        if down.ndim not in (2, 4):
            raise ValueError(f"{where}: {name} (down) has {down.ndim} axes; 2 or 4 are a LoRA's")
        rank = int(down.shape[0])
        settings.check_rank(name, rank)
        own = positive_number(roles["alpha"], f"{where}: alpha of {name}") if "alpha" in roles else settings.alpha(name)
        if own is None:
            own = float(rank) if alpha == "rank" else _given(alpha, where)
        found[name] = LoraLayer(down, roles["up"], own, _magnitude(roles, f"{where}: {name}"))
    return Lora(found, rslora=settings.rslora, targets=settings.targets)


def _given(alpha: float | str | None, where: str) -> float:
    if not isinstance(alpha, float | int):
        raise ValueError(
            f"{where} does not tell alpha, and no {PEFT_CONFIG} lies beside it: give the one that it was trained with"
        )
    return float(alpha)


def _magnitude(roles: Mapping[str, Tensor], where: str) -> Tensor | None:
    """DoRA's, one number an output.

    LyCORIS can also learn one an input: (1, inputs), of a convolution (1, inputs, 1, 1). That is refused, and must be
    told by the axis: where a layer has as many inputs as outputs, the numbers alone do not tell it.
    """
    num = roles["up"].shape[0]
    shapes = {"magnitude": ((num,), (1, num, 1, 1)), "scale": ((num, 1), (num, 1, 1, 1))}
    told = [role for role in shapes if role in roles]
    if not told:
        return None
    if len(told) > 1:
        raise ValueError(f"{where} has DoRA's magnitudes in two forms")
    found = roles[told[0]]
    if tuple(found.shape) not in shapes[told[0]]:
        wanted = " or ".join(map(str, shapes[told[0]]))
        raise ValueError(f"{where} (magnitude) is {tuple(found.shape)}; one number for each output is read, {wanted}")
    return found.flatten()
