"""What is trained: an autoencoder on images, a generator on latents. The optimising itself is `loop.train`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from derm_pipeline.images import Pixels
from derm_pipeline.latents import Embeddings, Moments, latent_statistics, orient, to_model_range
from derm_pipeline.models.autoencoder import Autoencoder, autoencoder_losses
from derm_pipeline.models.conditions import TEXT, TEXT_MASK, check_classes, draw_hidden, hide
from derm_pipeline.models.generator import AnyAutoencoder, Classes, GeneratorSpec, Network, build_network
from derm_pipeline.models.laws import Draw
from derm_pipeline.models.reconstruction import psnr_db
from derm_pipeline.models.runtime import autocast, join_processes
from derm_pipeline.training.draws import Batch
from derm_pipeline.training.loop import OnProgress, OnSamples, Trained, train
from derm_pipeline.training.settings import AutoencoderTraining, GeneratorTraining

__all__ = [
    "AutoencoderObjective",
    "GeneratorObjective",
    "example_chances",
    "latents_of",
    "psnr_db",
    "reconstruct",
    "train_autoencoder",
    "train_generator",
]


class AutoencoderObjective:
    """Images in random orientations (one a batch), given back through their latents."""

    def __init__(self, model: Autoencoder, images: Pixels, batch_size: int) -> None:
        """Of images (n, h, w, 3) uint8, which stay in the host's memory."""
        if len(images) == 0:
            raise ValueError("there is no image to train an autoencoder on")
        self._model, self._pixels, self._batch_size = model, torch.from_numpy(images), batch_size

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        config, size = self._model.config, self._batch_size
        chosen = torch.randint(len(self._pixels), (size,), generator=stream)
        orientation = int(torch.randint(8, (1,), generator=stream).numpy()[0])
        images = orient(self._pixels[chosen].permute(0, 3, 1, 2), orientation)
        sides = (side // config.downsampling for side in images.shape[2:])
        return {
            "images": images,
            "noise": torch.randn((size, config.latent_channels, *sides), generator=stream),
            "adversarial_scale": torch.full((size,), float(step >= config.adversarial_start)),
        }

    def loss(self, batch: Batch) -> Tensor:
        images = to_model_range(batch["images"].permute(0, 2, 3, 1))
        scale = batch["adversarial_scale"]
        return autoencoder_losses(self._model, images, batch["noise"], adversarial_scale=scale)[0]


def train_autoencoder(
    images: Pixels,
    config: AutoencoderTraining,
    *,
    work: Path,
    held_out: Pixels | None = None,
    on_progress: OnProgress | None = None,
    on_samples: OnSamples | None = None,
    stop_when: Callable[[], bool] | None = None,
    tensorboard: Path | None = None,
) -> tuple[Autoencoder, Trained]:
    """Train on images (n, h, w, 3) uint8, in random orientations.

    `held_out` are images that are never trained on, for a validation loss; see `loop.train` for the rest.
    """
    device = join_processes().device
    torch.manual_seed(config.training.seed)
    model = Autoencoder(config.network).to(device)
    size = config.training.batch_size
    trained = train(
        model,
        AutoencoderObjective(model, images, size),
        config.training,
        work=work,
        validation=None if held_out is None else AutoencoderObjective(model, held_out, size),
        identity={"network": config.network.model_dump(mode="json"), "num_images": len(images)},
        on_progress=on_progress,
        on_samples=on_samples,
        stop_when=stop_when,
        tensorboard=tensorboard,
    )
    return model, trained


@torch.no_grad()
def reconstruct(model: AnyAutoencoder, images: Tensor, *, batch_size: int = 128) -> Tensor:
    """Encode and decode images (n, 3, h, w) in [-1, +1], through the mean of their latents."""
    device = next(model.parameters()).device
    parts = []
    for batch in images.split(batch_size):
        with autocast(device):
            parts.append(model.decode(model.encode(batch.to(device))[0]).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


class GeneratorObjective:
    """Noised latents of rows drawn by diagnosis, with what is told of them; the law says what to predict."""

    def __init__(
        self,
        model: Network,
        spec: GeneratorSpec,
        moments: Tensor | Moments,
        labels: Mapping[str, Tensor],
        config: GeneratorTraining,
        text: Embeddings | None = None,
    ) -> None:
        """See `train_generator` for what is given."""
        _check_labels(labels, {name: spec.classes[name] for name in config.conditions}, len(moments), text)
        device = next(model.parameters()).device
        self._model, self._spec, self._config = model, spec, config
        self._moments = moments
        there = moments.to(device)
        self._resident = there if isinstance(there, Tensor) else None
        self._chances = example_chances(labels["diagnosis"], config.balance).cumsum(0)
        self._labels: dict[str, Tensor] = {name: labels[name].to(device) for name in config.conditions}
        self._hideable = [*config.conditions, *([TEXT] if text is not None else [])]
        self._text = None if text is None else _TextRows(text, labels[TEXT], device)
        statistics = torch.tensor([spec.latent_mean, spec.latent_std], dtype=torch.float32)
        self._mean, self._std = statistics.view(2, 1, -1, 1, 1).to(device)

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        size = self._config.training.batch_size
        drawn = torch.rand(size, generator=stream, dtype=torch.float64)
        rows = torch.searchsorted(self._chances, drawn).clamp_max(len(self._chances) - 1)
        orientations = torch.randint(self._moments.shape[1], (size,), generator=stream)
        channels, *sides = self._moments.shape[2:]
        shape = (size, channels // 2, *sides)
        batch = {"rows": rows, "orientations": orientations, "latent_noise": torch.randn(shape, generator=stream)}
        if self._resident is None:  # they are fetched where they lie
            batch["moments"] = self._moments[rows, orientations]
        together, each = self._config.condition_dropout, self._config.condition_dropout_each
        if self._text is not None:
            batch |= self._text.draw(rows)
        hidden = draw_hidden(self._hideable, size, stream, together=together, each=each)
        batch |= {f"hidden.{name}": is_hidden for name, is_hidden in hidden.items()}
        return batch | self._config.law.draw(shape, stream)._asdict()

    def loss(self, batch: Batch) -> Tensor:
        model, told = self._model, self.told(batch)
        hidden = {name: batch[f"hidden.{name}"] for name in self._hideable}
        told = hide(told, model.null_conditions(len(batch["rows"])), hidden)
        draw = Draw(*(batch[name] for name in Draw._fields))
        return self._config.law.loss(lambda x, time: model(x, time, told), self.latents(batch), draw)

    def latents(self, batch: Batch) -> Tensor:
        """The clean latents (n, c, h, w) of these rows, float32, as the network has them."""
        resident = self._resident
        moments = batch["moments"] if resident is None else resident[batch["rows"], batch["orientations"]]
        return (latents_of(moments, batch["latent_noise"]) - self._mean) / self._std

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """What is told of these rows, by condition, nothing hidden."""
        told = {name: labels[batch["rows"]] for name, labels in self._labels.items()}
        return told if self._text is None else told | self._text.told(batch)


class _TextRows:
    """The text of every row: resident on the device where the embeddings fit, else gathered for each batch."""

    def __init__(self, text: Embeddings, row_of: Tensor, device: torch.device) -> None:
        if len(row_of) and not 0 <= int(row_of.min()) <= int(row_of.max()) < len(text):
            raise ValueError(f"the rows of the text are {row_of.min()} to {row_of.max()} of {len(text)} embeddings")
        self._text, self._row_of = text, row_of
        self._resident = text.resident(device)

    def draw(self, rows: Tensor) -> Batch:
        texts = self._row_of[rows]
        return {"text_rows": texts} if self._resident is not None else self._text.gather(texts)

    def told(self, batch: Batch) -> dict[str, Tensor]:
        if self._resident is None:
            return {name: batch[name] for name in (TEXT, TEXT_MASK)}
        return {name: tensor[batch["text_rows"]] for name, tensor in self._resident.items()}


def train_generator(
    moments: Tensor | Moments,
    labels: Mapping[str, Tensor],
    classes: Classes,
    config: GeneratorTraining,
    *,
    work: Path,
    text: Embeddings | None = None,
    held_out: tuple[Tensor | Moments, Mapping[str, Tensor]] | None = None,
    on_progress: OnProgress | None = None,
    on_samples: Callable[[int, Network, GeneratorSpec], Pixels | None] | None = None,
    stop_when: Callable[[], bool] | None = None,
    tensorboard: Path | None = None,
) -> tuple[GeneratorSpec, Network, Trained]:
    """Train a conditional generator on moments.

    Args:
        moments: (n, orientations, 2 c, h, w), mean and log-variance; kept on the device where they fit.
        labels: of the diagnosis and each of `config.conditions`, the class index (n,) of every row; the null class
            where unknown. With `text` also of "text", the row of every image's caption in it.
        classes: of each condition, in order.
        config: network, law, budget.
        work: folder of the checkpoint.
        text: embeddings of captions ("text" and "text_mask"), where the generator is told them.
        held_out: moments and labels that are never trained on, for a validation loss: what a training loss would be
            on them, conditions hidden and diagnoses evened out alike.
        on_progress: see `loop.train`.
        on_samples: see `loop.OnSamples`; it is handed the generator's spec, too.
        stop_when: see `loop.train`.
        tensorboard: see `loop.train`.

    Raises:
        ValueError: labels outside their classes or not of the moments; and what `loop.train` refuses.
    """
    device = join_processes().device
    spec = _spec(moments, labels, classes, config, text)
    torch.manual_seed(config.training.seed)
    model = build_network(spec.network).to(device)
    trained = train(
        model,
        GeneratorObjective(model, spec, moments, labels, config, text),
        config.training,
        work=work,
        validation=GeneratorObjective(model, spec, *held_out, config, text) if held_out else None,
        identity=spec.model_dump(mode="json", exclude={"seen"})
        | config.model_dump(mode="json", exclude={"training", "law", "grid"}),
        on_progress=on_progress,
        on_samples=None if on_samples is None else lambda step, _: on_samples(step, model, spec),
        stop_when=stop_when,
        tensorboard=tensorboard,
    )
    return spec, model, trained


def _spec(
    moments: Tensor | Moments,
    labels: Mapping[str, Tensor],
    classes: Classes,
    config: GeneratorTraining,
    text: Embeddings | None,
) -> GeneratorSpec:
    missing = [name for name in config.conditions if name not in classes]
    if missing:
        raise ValueError(f"the generator is to be told {missing[0]}, of which no classes are given")
    if (text is None) != (config.text is None):
        raise ValueError("text embeddings are given where the settings name text, and only there")
    statistics = latent_statistics(moments)
    network = config.network(
        moments.shape[-1],
        moments.shape[2] // 2,
        {name: len(classes[name]) for name in config.conditions},
        text_width=0 if text is None else text.shapes[TEXT][-1],
    )
    told: dict[str, tuple[str, ...]] = {name: classes[name] for name in config.conditions}
    _check_labels(labels, told, len(moments), text)
    return GeneratorSpec(
        network=network,
        law=config.law,
        classes=told,
        seen=values_seen(labels, told),
        latent_mean=tuple(statistics["mean"]),
        latent_std=tuple(statistics["std"]),
    )


def _check_labels(labels: Mapping[str, Tensor], told: Classes, num: int, text: Embeddings | None) -> None:
    check_classes(labels, {name: len(known) for name, known in told.items()})
    for name in ("diagnosis", *told, *([TEXT] if text is not None else [])):
        if len(labels[name]) != num:
            raise ValueError(f"{name} is told of {len(labels[name])} rows, and there are moments of {num}")


def values_seen(labels: Mapping[str, Tensor], told: Classes) -> tuple[tuple[tuple[str | None, ...], int], ...]:
    """The values that occur together, in the order of their classes, and in how many rows."""
    rows, counts = torch.stack([labels[name].cpu() for name in told], 1).unique(dim=0, return_counts=True)
    values = [(*known, None) for known in told.values()]  # the null class is the last
    shown = [tuple(of[place] for of, place in zip(values, row, strict=True)) for row in rows.tolist()]
    return tuple(zip(shown, counts.tolist(), strict=True))


def latents_of(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (n, c, h, w), float32, of moments (n, 2 c, h, w) and standard normal noise (n, c, h, w)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + noise * (0.5 * logvar).exp()


def example_chances(diagnoses: Tensor, balance: float) -> Tensor:
    """The chance (n,) of every example to be drawn: proportional to its diagnosis' count to the power -balance."""
    counts = torch.bincount(diagnoses).double()
    weights = counts[diagnoses] ** -balance
    return weights / weights.sum()
