"""What a stage trains of a base: which parameters, by which texts they are told, and the files that they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from derm_pipeline.models.learned_embeddings import save_embeddings
from derm_pipeline.models.lora import LoraConfig, add_lora
from derm_pipeline.models.lora_files import save_lora
from derm_pipeline.models.pretrained.adapted import AVERAGES, EMBEDDINGS, LORA, TEXT_ENCODERS, WEIGHTS
from derm_pipeline.models.pretrained.base import Base
from derm_pipeline.models.pretrained.config import PretrainedNetworkConfig
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.runtime import save_weights
from derm_pipeline.training.fine_tuning_settings import FullStage, InversionStage, LoraStage, Stage
from derm_pipeline.training.inversion import LearnedRows, learn_tokens


class WithText(nn.Module):
    """A network and the text encoders that are trained with it."""

    def __init__(self, network: PretrainedNetwork, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network, self.text = network, nn.ModuleList(encoders)


@dataclass(frozen=True)
class Trainee:
    """A base of which a stage trains something; all else is fixed."""

    stage: Stage
    base: Base
    network: PretrainedNetwork
    rows: Sequence[LearnedRows] = field(default=())
    """The learned tokens of each text encoder, in an inversion."""

    @property
    def module(self) -> nn.Module:
        """What is trained, as one module."""
        return WithText(self.network, self.base.text_encoders) if trains_text(self.stage) else self.network

    @property
    def num_weights(self) -> int:
        """How many are trained."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def take_averages(self, averages: Mapping[str, Tensor]) -> None:
        """Put moving averages of `module` in the place of what was trained."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(averages[name])

    def save(self, folder: Path, averages: Mapping[str, Tensor] | None) -> None:
        """Write what was trained: of a whole denoiser also its weights as they are, else the averages alone."""
        if isinstance(self.stage, FullStage):
            save_weights(folder / WEIGHTS, self.base.denoiser.state_dict())
        if averages is not None:
            self.take_averages(averages)
        if isinstance(self.stage, FullStage) and averages is not None:
            save_weights(folder / AVERAGES, self.base.denoiser.state_dict())
        if isinstance(self.stage, LoraStage):
            self._save_lora(folder, self.stage)
        for name, rows in zip(EMBEDDINGS, self.rows, strict=False):
            save_embeddings(folder / name, rows.learned())

    def _save_lora(self, folder: Path, stage: LoraStage) -> None:
        (folder / LORA["denoiser"]).parent.mkdir(parents=True, exist_ok=True)
        if stage.denoiser is not None:
            save_lora(folder / LORA["denoiser"], self.base.denoiser)
        if stage.text is not None:
            for part, encoder in zip(TEXT_ENCODERS, self.base.text_encoders, strict=False):
                save_lora(folder / LORA[part], encoder)


def trains_text(stage: Stage) -> bool:
    """Whether texts change their meaning while a stage trains, so that they are embedded in its steps."""
    return isinstance(stage, InversionStage) or (isinstance(stage, LoraStage) and stage.text is not None)


def prepare(
    stage: Stage,
    base: Base,
    shape: PretrainedNetworkConfig,
    tokens: Sequence[str] = (),
    *,
    activation_checkpointing: bool = False,
) -> Trainee:
    """Make parameters of what a stage trains; fresh ones are drawn from the stage's seed.

    Args:
        stage: What is trained.
        base: Its parts, fixed; of a full stage the denoiser in float32.
        shape: Of the network.
        tokens: Those that an inversion learns.
        activation_checkpointing: Whether blocks are computed again in the backward pass.

    Raises:
        ValueError: LoRA targets that no layer is called by; a token that exists already.
    """
    network = PretrainedNetwork(shape, base.denoiser)
    rows: list[LearnedRows] = []
    torch.manual_seed(stage.training.seed)
    if isinstance(stage, LoraStage):
        if stage.denoiser is not None:
            add_lora(base.denoiser, stage.denoiser)
        if stage.text is not None:
            for encoder in base.text_encoders:
                add_lora(encoder, stage.text)
            _leave_out_what_is_not_told(base)
    elif isinstance(stage, FullStage):
        base.denoiser.requires_grad_(requires_grad=True)
    else:
        rows = learn_tokens(base, tokens, stage.initialiser, stage.num_vectors)
    parts = [base.denoiser, *(base.text_encoders if trains_text(stage) else ())]
    for part in parts:
        _drop_nothing(part)
    if activation_checkpointing:
        network.is_checkpointing = True
        for encoder in parts[1:]:
            encoder.activation_checkpointing_enable({"use_reentrant": False})
    return Trainee(stage, base, network, rows)


def check_lora(module: Any, config: LoraConfig) -> None:
    """See that an adapter could be put into a network, which is not touched.

    Raises:
        ValueError: as `add_lora`.
    """
    with torch.device("meta"):
        build = getattr(type(module), "from_config", type(module))
        add_lora(build(module.config), config)


def _leave_out_what_is_not_told(base: Base) -> None:
    """SDXL is told the last layer but one of its first text encoder: an adapter of the last would have no gradient."""
    if base.family != "sdxl":
        return
    encoder = base.text_encoders[0]
    last = f"layers.{encoder.config.num_hidden_layers - 1}."
    for name, parameter in encoder.named_parameters():
        if last in name:
            parameter.requires_grad_(requires_grad=False)


def _drop_nothing(module: nn.Module) -> None:
    """No dropout in a pretrained network (T5 has some): what is told of a text would depend on chance."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(vars(part).get("dropout"), float):
            part.dropout = 0.0  # type: ignore[assignment]  # a number that attention of transformers goes by
