"""Files in the public DiT checkpoints' format, in and out: `DiT-XL-2-256x256.pt`, and what trainers like it write.

Two kinds of file: `.pt`, which `torch.save` writes, holding names and tensors or those under "ema" and "model"; and
`.safetensors`. Nothing in a file is ever executed, and a model changes only when all of a file fits.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from derm_pipeline.models.dit import DiT
from derm_pipeline.models.dit_config import DiTConfig
from derm_pipeline.store import replacing

CLASS_TABLE = "y_embedder.embedding_table.weight"
NUM_SHOWN = 4
"""Names that a message shows of each kind."""

_BROKEN = (
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    OSError,
    struct.error,
)
"""What reading a damaged archive raises, depending on where the damage is."""

Weights = Literal["ema", "model"]
"""The averaged weights, or those that the optimiser moves."""


@dataclass(frozen=True)
class Loaded:
    """What a model took from a file."""

    weights: Literal["ema", "model", "only"]
    """Which of the file's weights; "only" where it holds just one, without a name."""
    num_loaded: int
    """Tensors that were taken whole."""
    fresh: tuple[str, ...]
    """Names of the model's tensors that stay as they were, as was asked; of the class table all but the null's row."""


def load_public_checkpoint(path: Path, model: DiT, *, weights: Weights = "ema", fresh: Collection[str] = ()) -> Loaded:
    """Put the weights of a file in the public DiT format into a model of that shape, all or none.

    The number of heads shows in no shape and a `.pt` does not tell it: the model must be built with the file's.

    Args:
        path: `.pt`, as of facebookresearch/DiT and fast-DiT, or `.safetensors`.
        model: Where they go; its precision and device stay.
        weights: Which to take where the file holds both "ema" and "model"; where it holds one, that is taken.
        fresh: Parts of the model that are to stay as they are, by the first word of their names. With "y_embedder",
            the model's classes may be others than the file's, in number too: their rows stay, and the file's null
            row becomes the model's. With "extra_embedders" or "text_embedder", a model told more than the public
            one is. With "pos_embed", a model with rotary positions, or of another latent size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one that does not fit: the names that are missing, unexpected or of another
            shape. The model is as it was.
    """
    which, state = _read(path, weights)
    own = model.state_dict()
    stay = tuple(name for name in own if name.split(".")[0] in fresh)
    unknown = sorted(set(fresh) - set(_parts(own)))
    if unknown:
        raise ValueError(f"fresh {unknown[0]!r} is no part of the model: {', '.join(_parts(own))}")
    if model.config.positions == "rotary" and "pos_embed" not in fresh:
        raise ValueError(
            f"{path} has learned with a position table and the model has rotary positions: add 'pos_embed' to `fresh` "
            "if it is to be trained on with those, else build it with positions sincos"
        )
    _check_heads(path, model.config)
    _check_fit(path, state, own, fresh)
    taken = {name: value for name, value in state.items() if name.split(".")[0] not in fresh}
    null_row = _null_row(state, own) if CLASS_TABLE in stay else None
    _check_values(path, taken if null_row is None else taken | {CLASS_TABLE: null_row})
    with torch.no_grad():
        for name, value in taken.items():
            own[name].copy_(value)
        if null_row is not None:
            own[CLASS_TABLE][-1].copy_(null_row)
    return Loaded(weights=which, num_loaded=len(taken), fresh=stay)


def save_public_checkpoint(path: Path, model: DiT, *, ema: Mapping[str, Tensor] | None = None) -> None:
    """Write weights in the public DiT format, so that other programs load them; all of the file or nothing.

    Args:
        path: `.pt`: names and tensors as facebookresearch/DiT reads them, under "model" and "ema" if `ema` is given;
            or `.safetensors`: one set of weights, with the number of heads as metadata.
        model: The network.
        ema: Its averaged weights by name, those of the model's tensors that they lack being taken from it;
            a `.safetensors` file holds them instead of the model's.

    Raises:
        ValueError: a model that the public format has no place for, and what of it, or another kind of file.
    """
    foreign = _not_public(model.config)
    if foreign:
        raise ValueError(f"the public DiT format has no place for {' and '.join(foreign)}; save the generator instead")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    averaged = state | {name: value.detach().cpu().contiguous() for name, value in (ema or {}).items()}
    strange = sorted(averaged.keys() - state.keys())
    if strange:
        raise ValueError(f"averaged weights of {strange[0]}, which the model does not have")
    if path.suffix == ".safetensors":
        with replacing(path) as aside:
            save_file(averaged, aside, metadata={"heads": str(model.config.heads)})
    elif path.suffix == ".pt":
        with replacing(path) as aside:
            torch.save(state if ema is None else {"model": state, "ema": averaged}, aside)
    else:
        raise ValueError(f"{path.name} ends in neither .pt nor .safetensors")


def _not_public(config: DiTConfig) -> list[str]:
    """What a configuration has that the public DiT does not, in words."""
    foreign = [f"condition {name}" for name in list(config.conditions)[1:]]
    foreign += ["text"] if config.has_text else []
    foreign += ["qk_norm"] if config.qk_norm else []
    return foreign + (["rotary positions"] if config.positions == "rotary" else [])


def _read(path: Path, weights: Weights) -> tuple[Literal["ema", "model", "only"], dict[str, Tensor]]:
    """The weights in a file, and which of them they are; nothing of it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    which: Literal["ema", "model", "only"] = "only"
    if isinstance(found, dict) and found.keys() & {"ema", "model"}:
        other: Weights = "model" if weights == "ema" else "ema"
        which = weights if weights in found else other
        found = found[which]
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no weights by name")
    for name, value in found.items():
        if not _is_plain(value):
            raise ValueError(f"{path}: {name} is no plain tensor of floating-point numbers")
    return which, found


def _is_plain(value: object) -> bool:
    """Whether it can be copied from: nothing but numbers that are there, so that no copy fails half-way."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _read_torch(path: Path) -> object:
    """What `torch.save` wrote: mapped, not read, so that an optimiser's moments beside the weights cost nothing."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no file of torch.save's (since 1.6), or is cut short; nothing else is opened")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # fast-DiT's "args": names and plain values
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the guard off, which is the last thing to do with a stranger's file
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"asks to run {named[1]}" if named else "is no list of names and tensors"
        raise ValueError(f"{path} {reason}: refused, and nothing of it was run") from None
    except _BROKEN as error:
        raise ValueError(f"{path} is broken ({type(error).__name__}); nothing of it was run") from None


def _check_heads(path: Path, config: DiTConfig) -> None:
    """Refuse a file that tells another number of heads, which no shape shows; only ours tell it."""
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as handle:
        heads = (handle.metadata() or {}).get("heads", str(config.heads))
    if heads != str(config.heads):
        raise ValueError(f"{path} is of a DiT of {heads} heads, and the model has {config.heads}: build it with those")


def _check_fit(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor], fresh: Collection[str]) -> None:
    wanted = {name for name in own if name.split(".")[0] not in fresh}
    offered = {name for name in state if name.split(".")[0] not in fresh}
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in sorted(wanted & offered)}
    differ = [f"{name} {there}, here {here}" for name, (there, here) in shapes.items() if there != here]
    if wanted != offered or differ:
        problems = [
            _listed("missing", sorted(wanted - offered)),
            _listed("unexpected", sorted(offered - wanted)),
            _listed("of another shape", differ),
        ]
        hint = _hint({name for name, (there, here) in shapes.items() if there != here} | (wanted ^ offered), own)
        raise ValueError(
            f"{path} does not fit the model, which is as it was: {'; '.join(filter(None, problems))}{hint}"
        )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:NUM_SHOWN])}{more})"


def _hint(differ: set[str], own: Collection[str]) -> str:
    """What to do where only parts differ that a model can start anew."""
    parts = {name.split(".")[0] for name in differ}
    replaceable = {"y_embedder", "extra_embedders", "text_embedder", "final_layer", "pos_embed"}
    if not parts <= replaceable & set(_parts(own)):
        return ""
    return f". To keep the model's own {' and '.join(sorted(parts))} and take the rest, give fresh={sorted(parts)}"


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite; the model is unchanged")


def _null_row(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor | None:
    """The features (d,) of the file's null class, where it has one for a model of this width."""
    table = state.get(CLASS_TABLE)
    return (
        table[-1] if table is not None and table.ndim == 2 and table.shape[1:] == own[CLASS_TABLE].shape[1:] else None
    )


def _parts(own: Collection[str]) -> list[str]:
    """The first words of a model's names."""
    return list(dict.fromkeys(name.split(".")[0] for name in own))
