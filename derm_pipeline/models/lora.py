"""LoRA on any network of diffusers or transformers: what is adapted, and the weights that leave and enter a network.

By peft's layers, put into the network itself, so that it stays of its own class. A `Lora` is one network's adapter
without the network; `lora_files` reads and writes it. torch and peft are imported where they are used.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_RANK = 1024
"""Larger ones are refused; published adapters have 4 to 512."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NUM_SHOWN = 4


class LoraConfig(BaseModel):
    """Which layers of a network are adapted, and how (Hu et al. 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, le=MAX_RANK)
    """Rows of the down and columns of the up matrix."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The change is scaled by alpha / rank; None: alpha is the rank, which scales by 1."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Linear and convolution layers by name, or by the last words of their names (`to_q`, `ff.net.2`)."""
    dora: bool = False
    """Whether each output's magnitude is learnt apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""
    rslora: bool = False
    """Whether the change is scaled by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)."""
    init: Literal["default", "gaussian"] = "default"
    """Of the down matrix: uniform as a linear layer's, or normal of spread 1 / rank; the up matrix is zero."""


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one layer."""

    down: Tensor
    """(rank, inputs), of a convolution (rank, inputs, height, width)."""
    up: Tensor
    """(outputs, rank), of a convolution (outputs, rank, 1, 1)."""
    alpha: float
    magnitude: Tensor | None = None
    """(outputs,), of DoRA only."""

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Lora:
    """One network's adapter, apart from the network."""

    layers: Mapping[str, LoraLayer]
    """By the name of the layer; each with a rank and an alpha of its own."""
    rslora: bool = False
    targets: tuple[str, ...] = ()
    """What the names were chosen by, where that is known."""

    @property
    def dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())

    def scale(self, name: str) -> float:
        """What this layer's change is multiplied by."""
        layer = self.layers[name]
        return layer.alpha / (layer.rank**0.5 if self.rslora else layer.rank)


def add_lora(module: nn.Module, config: LoraConfig, name: str = "default") -> tuple[str, ...]:
    """Put a fresh adapter into a network: from now on only its weights are trained, and the network's stand still.

    The adapter's weights are float32 whatever the network's precision, drawn from torch's global generator, and change
    nothing before they are trained. Of several adapters the last one is in force.

    Returns:
        The names of the adapted layers, in the network's order.

    Raises:
        ValueError: a target that no linear or convolution layer is called by, with those that are called most like
            it; or a name that an adapter of this network has already.
    """
    names = _targeted(module, config.targets)
    alpha = config.alpha or float(config.rank)
    ranks = dict.fromkeys(names, (config.rank, alpha))
    _inject(module, ranks, name, config.targets, dora=config.dora, rslora=config.rslora, init=config.init)
    return names


def count_lora(module: nn.Module, name: str = "default") -> int:
    """How many weights this adapter trains."""
    return sum(
        weight.numel() for _, layer in _adapted(module, name) for weight in _weights(layer, name) if weight is not None
    )


def take_lora(module: nn.Module, name: str = "default") -> Lora:
    """A copy of the adapter in a network, on the CPU.

    Raises:
        ValueError: it has no such adapter, and which it has.
    """
    import torch

    layers = {}
    for layer_name, layer in _adapted(module, name):
        down, up, magnitude = (None if one is None else one.detach().cpu().clone() for one in _weights(layer, name))
        assert isinstance(down, torch.Tensor)
        assert isinstance(up, torch.Tensor)
        flat = None if magnitude is None else magnitude.flatten()
        layers[layer_name] = LoraLayer(down, up, float(layer.lora_alpha[name]), flat)
    configs: Any = module.peft_config
    config = configs[name]
    targets = config.target_modules
    told = () if isinstance(targets, str) or targets is None else tuple(sorted(targets))
    return Lora(layers, rslora=bool(config.use_rslora), targets=told)


def put_lora(module: nn.Module, lora: Lora, name: str = "default") -> None:
    """Put an adapter with its weights into a network, all of it or nothing; see `add_lora`.

    Raises:
        ValueError: as `fit_lora`.
    """
    import torch

    fitted = fit_lora(module, lora, name)
    ranks = {layer: (found.rank, found.alpha) for layer, found in fitted.layers.items()}
    targets = lora.targets if _chosen_by(lora.targets, adaptable(module)) == ranks.keys() else tuple(ranks)
    _inject(module, ranks, name, targets, dora=lora.dora, rslora=lora.rslora)
    with torch.no_grad():
        for layer_name, layer in _adapted(module, name):
            found = fitted.layers[layer_name]
            for weight, value in zip(_weights(layer, name), (found.down, found.up, found.magnitude), strict=True):
                if weight is not None and value is not None:
                    weight.copy_(value.view_as(weight))


def fit_lora(module: nn.Module, lora: Lora, name: str = "default", *, where: str = "the adapter") -> Lora:
    """The adapter in the shapes of a network that could take it under this name; the network is not touched.

    Raises:
        ValueError: layers that the network does not have, or of another shape there, ranks beyond `MAX_RANK`, values
            that are not finite, a name that is taken; the message begins with `where` and names them.
    """
    _check_name(module, name)
    known = adaptable(module)
    strange = [layer for layer in lora.layers if layer not in known]
    if strange:
        near = difflib.get_close_matches(strange[0], known, n=1, cutoff=0)
        hint = f" (most like the first is {near[0]})" if near else ""
        raise ValueError(f"{where}: {type(module).__name__} has no layer {some(strange)} to adapt{hint}")
    if not lora.layers:
        raise ValueError(f"{where} adapts no layer")
    plain = [layer for layer, found in lora.layers.items() if found.magnitude is None]
    if lora.dora and plain:
        raise ValueError(f"{where} has DoRA's magnitudes for some layers, and none for {some(plain)}")
    fitted = {layer: _fitted(found, known[layer], f"{where}: {layer}") for layer, found in lora.layers.items()}
    return replace(lora, layers=fitted)


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can be put into, by name: linear ones and convolutions that are not grouped."""
    from peft.tuners.lora import LoraLayer as PeftLayer
    from torch import nn

    found: dict[str, nn.Module] = {}
    adapters: list[str] = []
    for name, layer in module.named_modules():
        if any(name.startswith(prefix) for prefix in adapters):
            continue
        base = layer
        if isinstance(layer, PeftLayer):
            adapters.append(f"{name}.")
            base = layer.get_base_layer()
        if isinstance(base, nn.Linear) or (isinstance(base, nn.Conv2d) and base.groups == 1):
            found[name] = base
    return found


def _chosen_by(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """Of these names, those that are a target or end in one, after a dot."""
    wanted = tuple(targets)
    return {name for name in names if any(name == one or name.endswith(f".{one}") for one in wanted)}


def _targeted(module: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    known = adaptable(module)
    missing = [target for target in targets if not _chosen_by([target], known)]
    if missing:
        others = _chosen_by([missing[0]], (name for name, _ in module.named_modules()))
        kind = type(module.get_submodule(sorted(others)[0])).__name__ if others else ""
        reason = f"is called so (only a {kind} is, which cannot be adapted)" if kind else "is called so"
        raise ValueError(
            f"LoRA target {missing[0]!r}: no linear or convolution layer of {type(module).__name__} {reason}; "
            f"{_nearest(missing[0], known)}"
        )
    chosen = _chosen_by(targets, known)
    return tuple(name for name in known if name in chosen)


def _nearest(word: str, names: Iterable[str]) -> str:
    """The endings of these names that are most like a word, as a part of a sentence."""
    endings = dict.fromkeys(
        ".".join(parts[start:])
        for parts in (name.split(".") for name in names)
        for start in range(len(parts) - 1, -1, -1)
        if not parts[start].isdigit()
    )
    near = difflib.get_close_matches(word, endings, n=_NUM_SHOWN, cutoff=0.5)
    if near:
        return f"nearest are {', '.join(near)}"
    last = [ending for ending in endings if "." not in ending]
    return f"there are {', '.join(last[:12])}"


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _NUM_SHOWN} more" if len(every) > _NUM_SHOWN else ""
    return ", ".join(every[:_NUM_SHOWN]) + more


def _inject(
    module: nn.Module,
    ranks: Mapping[str, tuple[int, float]],
    name: str,
    targets: Iterable[str],
    *,
    dora: bool,
    rslora: bool,
    init: str = "default",
) -> None:
    """Put fresh adapters of these ranks and alphas into exactly the named layers."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    _check_name(module, name)
    rank, alpha = next(iter(ranks.values()))
    config = PeftConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int and divides it
        target_modules=list(targets),
        rank_pattern={_exactly(layer): own for layer, (own, _) in ranks.items() if own != rank},
        alpha_pattern={_exactly(layer): own for layer, (_, own) in ranks.items() if own != alpha},
        use_dora=dora,
        use_rslora=rslora,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    is_on_meta = all(weight.device.type == "meta" for weight in module.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")  # a name may end in another's
        keys: dict[str, Any] = dict.fromkeys(f"{layer}.lora_A.weight" for layer in ranks)
        inject_adapter_in_model(config, module, name, low_cpu_mem_usage=is_on_meta, state_dict=keys)
    if hasattr(module, "_hf_peft_config_loaded"):  # so that diffusers' and transformers' own methods see it
        setattr(module, "_hf_peft_config_loaded", True)  # noqa: B010  # plain assignment: a Module's, for mypy
    for _, layer in _adapted(module, name):
        for weight in _weights(layer, name):
            if weight is not None:
                weight.data = weight.data.to(torch.float32)


def _check_name(module: nn.Module, name: str) -> None:
    if not _ADAPTER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for an adapter: letters, digits, _ and - only")
    if name in getattr(module, "peft_config", {}):
        raise ValueError(f"{type(module).__name__} has an adapter {name!r} already; take another name")


def _exactly(layer: str) -> str:
    """A pattern of peft's that only this layer's name meets."""
    return f"^{re.escape(layer)}"


def _adapted(module: nn.Module, name: str) -> list[tuple[str, Any]]:
    """The layers with this adapter."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = [
        (layer_name, layer)
        for layer_name, layer in module.named_modules()
        if isinstance(layer, PeftLayer) and name in layer.lora_A
    ]
    if not found:
        others = ", ".join(getattr(module, "peft_config", {})) or "none"
        raise ValueError(f"{type(module).__name__} has no LoRA called {name!r}; its adapters: {others}")
    return found


def _weights(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """Down, up and magnitude of a layer of peft's."""
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, magnitude


def _fitted(found: LoraLayer, layer: nn.Module, where: str) -> LoraLayer:
    """The adapter in the shape that this layer needs: some programs write 1 x 1 convolutions as linear layers."""
    inputs, outputs, kernel = _shape_of(layer)
    rank = found.rank
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{where} has rank {rank}; 1 to {MAX_RANK} are read")
    wanted = {
        "down": (found.down, (rank, inputs, *kernel)),
        "up": (found.up, (outputs, rank, *(1 for _ in kernel))),
        "magnitude": (found.magnitude, (outputs,)),
    }
    fitted: dict[str, Tensor] = {}
    for part, (value, shape) in wanted.items():
        if value is None:
            continue
        if _without_ones(value.shape) != _without_ones(shape):
            raise ValueError(f"{where} ({part}) is {tuple(value.shape)} in the file and {shape} in the network")
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{where} ({part}) holds values that are no finite numbers")
        fitted[part] = value.reshape(shape)
    return replace(found, **fitted)  # type: ignore[arg-type]  # tensors all, under their own names


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """The first two sizes, and what follows unless it is 1 x 1."""
    sizes = tuple(shape)
    return sizes[:2] if len(sizes) == 4 and sizes[2:] == (1, 1) else sizes


def _shape_of(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Inputs, outputs and kernel of a layer; a linear one has none."""
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features, ()
