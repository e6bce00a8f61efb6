"""The training of a pretrained base, by the one loop: its stages in turn, each resumed where it was left.

A stage leaves a folder that is a whole generator: what it trained, what the stages before it did, `generator.json` and
what is told of nothing. The next stage loads the base anew and puts that into it; so does whoever samples. So a stage
starts from the same numbers whether the one before has just ended or was done by a process that is long gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from derm_pipeline.images import Pixels
from derm_pipeline.latents import Moments
from derm_pipeline.latents.text_cache import EMPTY, Embeddings
from derm_pipeline.models.conditions import check_classes
from derm_pipeline.models.generator import Classes, GeneratorSpec
from derm_pipeline.models.pretrained.adapted import Embed, put_denoiser, put_text
from derm_pipeline.models.pretrained.base import Base, load_base, load_base_of
from derm_pipeline.models.pretrained.config import Part
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.runtime import join_processes
from derm_pipeline.store import digest_of_file, digest_of_json
from derm_pipeline.training.draws import Objective
from derm_pipeline.training.fine_tuned import Captioned, FineTuned, StageTrained, read_done, write_done
from derm_pipeline.training.fine_tuning_objective import Examples, FineTuningObjective, Prior
from derm_pipeline.training.fine_tuning_settings import FineTuning, FullStage, InversionStage, LoraStage, Stage
from derm_pipeline.training.hldf import Hldf, HldfObjective, frozen_decoder
from derm_pipeline.training.loop import OnProgress, Trained, train
from derm_pipeline.training.objectives import values_seen
from derm_pipeline.training.prior import obtain_prior
from derm_pipeline.training.stage_embeddings import StageEmbeddings, num_cut
from derm_pipeline.training.told_texts import CachedTexts, EncodedTexts, ToldTexts
from derm_pipeline.training.trainee import Trainee, check_lora, prepare, trains_text

OnFineTuningSamples = Callable[[int, PretrainedNetwork, GeneratorSpec, Embed], Pixels | None]
"""(steps done in all stages, the network, what it is, training texts to what it is told of them) -> a picture, or None;
see `loop.OnSamples`."""

_DONE, _GENERATOR = "done.json", "generator"


def fine_tune(
    images: Captioned,
    classes: Classes,
    config: FineTuning,
    *,
    work: Path,
    text: Embeddings | None = None,
    held_out: Captioned | None = None,
    on_progress: OnProgress | None = None,
    on_samples: OnFineTuningSamples | None = None,
    stop_when: Callable[[], bool] | None = None,
    tensorboard: Path | None = None,
) -> FineTuned:
    """Train a pretrained base on captioned images, in one stage or several.

    Args:
        images: What is trained on.
        classes: Of the diagnosis, in order.
        config: Base, stages, loss.
        work: Folder of checkpoints and of what finished stages left; the caller removes it when the result is safe.
        text: Embeddings of the captions, of `config.further_texts` and of the empty text, `Base.text_identity` being
            their encoder. Where there are none, or some are missing, they are made here, once.
        held_out: Images that are never trained on, for a validation loss.
        on_progress: See `loop.train`; of the steps of all stages.
        on_samples: See `OnFineTuningSamples`.
        stop_when: See `loop.train`.
        tensorboard: Folder for event files, one for each stage within it.

    Raises:
        FileNotFoundError: the base is not there.
        ValueError: what does not fit together, and what `load_base`, `add_lora` and `loop.train` refuse.
        Interrupted: see `loop.train`; called again with the same arguments, it goes on in the stage that was left.
    """
    for one in (images, held_out):
        if one is not None:
            _check_images(one, classes)
    tokens = config.tokens(classes["diagnosis"])
    _check_tokens_are_told(config, tokens, images.captions)
    run = _Run(images, held_out, classes, config, tokens, work, text)
    watch = _Watch(on_progress, on_samples, stop_when, tensorboard)
    before: Path | None = None
    stages: list[StageTrained] = []
    for number, stage in enumerate(config.stages, 1):
        here = work / f"stage-{number}-{stage.kind}"
        stages.append(run.obtain(stage, here, before, watch, sum(len(one.losses) for one in stages)))
        before = here / _GENERATOR
    assert before is not None  # there is a stage
    return FineTuned(before, GeneratorSpec.load(before), tuple(stages))


def _check_images(images: Captioned, classes: Classes) -> None:
    if "diagnosis" not in classes:
        raise ValueError("the classes of the diagnosis are not given")
    num = len(images.moments)
    for what, found in (("diagnoses", len(images.diagnoses)), ("captions", len(images.captions))):
        if found != num:
            raise ValueError(f"there are {what} of {found} images, and moments of {num}")
    check_classes({"diagnosis": images.diagnoses}, {"diagnosis": len(classes["diagnosis"])})
    if bool((images.diagnoses == len(classes["diagnosis"])).any()):
        raise ValueError("the diagnosis of some images is not known: leave them out")


def _check_tokens_are_told(config: FineTuning, tokens: Mapping[str, str], captions: Sequence[str]) -> None:
    """What is learnt in an inversion must be told afterwards, else it was learnt for nothing."""
    if len(config.stages) == 1:
        return
    untold = [token for token in tokens.values() if not any(token in caption for caption in captions)]
    if untold:
        raise ValueError(f"no caption has the learned token {untold[0]!r}: take captions that do, as skin_diff's")


@dataclass(frozen=True)
class _Watch:
    """Who looks on."""

    on_progress: OnProgress | None
    on_samples: OnFineTuningSamples | None
    stop_when: Callable[[], bool] | None
    tensorboard: Path | None


class _Run:
    """What all stages have in common."""

    def __init__(
        self,
        images: Captioned,
        held_out: Captioned | None,
        classes: Classes,
        config: FineTuning,
        tokens: Mapping[str, str],
        work: Path,
        text: Embeddings | None,
    ) -> None:
        self._images, self._held_out, self._classes = images, held_out, {"diagnosis": classes["diagnosis"]}
        self._config, self._tokens, self._work, self._text = config, tokens, work, text
        self._processes = join_processes()
        self._device = self._processes.device

    def obtain(self, stage: Stage, here: Path, before: Path | None, watch: _Watch, num_done: int) -> StageTrained:
        """The stage's result, trained unless it is there."""
        identity = self._identity(stage, before)
        if (here / _DONE).is_file():
            return read_done(here / _DONE, identity)
        base = self._load(stage, before)
        if before is None:
            _check_later(self._config.stages[1:], base)
        trainee, texts, spec = self._prepared(stage, base, here, before)
        config = self._config
        trained = train(
            trainee.module,
            self._objective(trainee, texts, spec),
            stage.training,
            work=here,
            validation=self._validation(trainee, texts, spec),
            identity=identity | {"spec": spec.model_dump(mode="json", exclude={"seen"})},
            on_progress=None
            if watch.on_progress is None
            else lambda step, _, loss: watch.on_progress(num_done + step, config.num_steps, loss),  # type: ignore[misc]
            on_samples=None
            if watch.on_samples is None
            else lambda step, _: watch.on_samples(num_done + step, trainee.network, spec, texts.embed),  # type: ignore[misc]
            stop_when=watch.stop_when,
            tensorboard=None if watch.tensorboard is None else watch.tensorboard / here.name,
        )
        done = StageTrained(
            stage.kind,
            trained.losses,
            trained.validation,
            trainee.num_weights,
            texts.num_cut,
            trained.resumed_from_step,
        )
        if self._processes.is_main_process:
            _save(here, before, trainee, trained, texts, spec)
            write_done(here / _DONE, identity, done)
        self._processes.wait_for_everyone()
        return done

    def _identity(self, stage: Stage, before: Path | None) -> dict[str, Any]:
        """What decides a stage's weights beside its budget and optimiser."""
        files = [] if before is None else sorted(path for path in before.rglob("*") if path.is_file())
        return {
            "fine_tuning": self._config.model_dump(mode="json", exclude={"stages", "grid"}),
            "stage": stage.model_dump(mode="json", exclude={"training"}) | {"training": stage.training.deciding()},
            "tokens": dict(self._tokens),
            "captions": digest_of_json(list(self._images.captions)),
            "before": {path.name: digest_of_file(path) for path in files},
        }

    def _load(self, stage: Stage, before: Path | None) -> Base:
        """The parts of the base that a stage computes with, as the stages before it left them."""
        parts: list[Part] = ["denoiser"]
        parts += ["text"] if trains_text(stage) else []
        parts += ["vae"] if self._config.hldf and not isinstance(stage, InversionStage) else []
        trained: tuple[Part, ...] = ("denoiser",) if isinstance(stage, FullStage) else ()
        if before is None:
            return load_base(self._config.base, self._device, parts=parts, trained=trained)
        network = GeneratorSpec.load(before).network
        assert network.kind == "pretrained"  # a stage wrote it
        base = load_base_of(network.base, self._device, parts=parts, trained=trained)
        put_denoiser(before, base.denoiser)
        if "text" in parts:
            put_text(before, base.text_encoders, base.tokenizers)
        return base

    def _prepared(
        self, stage: Stage, base: Base, here: Path, before: Path | None
    ) -> tuple[Trainee, ToldTexts, GeneratorSpec]:
        """What is trained, what it is told, and what it is."""
        is_told_anew = trains_text(stage)
        texts: ToldTexts | None = None
        told_shapes = None
        if not is_told_anew:
            embeddings, num_too_long = self._embeddings(base, here, before)
            null = base.null_of(embeddings.gather(embeddings.rows_of([EMPTY])))
            texts, told_shapes = CachedTexts(embeddings, null, self._device, num_too_long), embeddings.shapes
        shape = base.network_config(self._images.moments.shape[-1], told_shapes)
        _check_moments(self._images.moments, shape.channels)
        trainee = prepare(
            stage,
            base,
            shape,
            tuple(self._tokens.values()),
            activation_checkpointing=self._config.activation_checkpointing,
        )
        if texts is None:
            num_too_long = None if isinstance(stage, InversionStage) else num_cut(base, self._images.captions)
            texts = EncodedTexts(base, self._texts_of(stage), self._device, num_too_long)
        with torch.no_grad():
            trainee.network.set_null(texts.null(1))
        mean, std = base.latent_scaling
        spec = GeneratorSpec(
            network=shape,
            law=self._config.law(base.law),
            classes=self._classes,
            seen=values_seen({"diagnosis": self._images.diagnoses}, self._classes),
            latent_mean=mean,
            latent_std=std,
        )
        return trainee, texts, spec

    def _texts_of(self, stage: Stage) -> list[str]:
        """All that a stage may tell, each once."""
        if isinstance(stage, InversionStage):
            return [template.format(token) for token in self._tokens.values() for template in stage.templates]
        held_out = () if self._held_out is None else self._held_out.captions
        return list(dict.fromkeys([*self._images.captions, *held_out, *self._config.further_texts]))

    def _embeddings(self, base: Base, here: Path, before: Path | None) -> tuple[Embeddings, int | None]:
        """Of all texts of the recipe, by the text encoders as they are before this stage; and how many are cut."""
        wanted = self._texts_of(self._config.stages[-1])
        own = StageEmbeddings(base, before)
        given = self._text
        if given is not None and own.is_published and all(text in given for text in [EMPTY, *wanted]):
            if given.encoder != own.identity:
                raise ValueError("the text embeddings are not of this base: materialise `latents` again")
            return given, None
        folder = (self._work if own.is_published else here) / "texts"
        return own.obtain(folder, wanted, self._images.captions, self._device)

    def _examples(self, images: Captioned, stage: Stage, texts: ToldTexts) -> Examples:
        if not isinstance(stage, InversionStage):
            return Examples(images.moments, images.diagnoses, texts.rows(images.captions)[:, None])
        choices = [
            texts.rows([template.format(token) for template in stage.templates]) for token in self._tokens.values()
        ]
        return Examples(images.moments, images.diagnoses, torch.stack(choices)[images.diagnoses.cpu()])

    def _objective(self, trainee: Trainee, texts: ToldTexts, spec: GeneratorSpec) -> Objective:
        stage, config = trainee.stage, self._config
        if isinstance(stage, InversionStage):
            return self._plain(self._images, trainee, texts, spec)
        prior: Prior | None = None
        if config.prior is not None:
            path = self._work / f"prior-{digest_of_json(config.prior.model_dump(mode='json'))[:16]}.safetensors"
            precision = stage.training.precision
            prior = obtain_prior(path, config.prior, trainee.network, spec, texts, precision)
        inner = self._plain(self._images, trainee, texts, spec, prior)
        if config.hldf is None or trainee.base.vae is None:
            return inner
        decode = frozen_decoder(trainee.base.vae, spec.latent_mean, spec.latent_std)
        return HldfObjective(inner, Hldf(config.hldf, spec.law, trainee.network, decode), null=inner.null)

    def _validation(self, trainee: Trainee, texts: ToldTexts, spec: GeneratorSpec) -> Objective | None:
        return None if self._held_out is None else self._plain(self._held_out, trainee, texts, spec)

    def _plain(
        self, images: Captioned, trainee: Trainee, texts: ToldTexts, spec: GeneratorSpec, prior: Prior | None = None
    ) -> FineTuningObjective:
        stage = trainee.stage
        return FineTuningObjective(
            trainee.network,
            spec,
            self._examples(images, stage, texts),
            texts,
            self._config,
            stage.training.batch_size,
            self._device,
            caption_dropout=0.0 if isinstance(stage, InversionStage) else self._config.caption_dropout,
            prior=prior,
        )


def _check_moments(moments: Tensor | Moments, channels: int) -> None:
    if moments.shape[2] != 2 * channels:
        raise ValueError(
            f"the latents have {moments.shape[2] // 2} channels and the base's {channels}: they are of another "
            "autoencoder than its own"
        )


def _check_later(stages: Sequence[Stage], base: Base) -> None:
    """Refuse adapters that a later stage could not put in, before the work of the first."""
    for stage in stages:
        if isinstance(stage, LoraStage):
            if stage.denoiser is not None:
                check_lora(base.denoiser, stage.denoiser)
            if stage.text is not None and "text" in base.parts:
                for encoder in base.text_encoders:
                    check_lora(encoder, stage.text)


def _save(
    here: Path, before: Path | None, trainee: Trainee, trained: Trained, texts: ToldTexts, spec: GeneratorSpec
) -> None:
    """Write the generator that a stage leaves."""
    folder = here / _GENERATOR
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed just here
    folder.mkdir(parents=True)
    if before is not None:
        shutil.copytree(before, folder, dirs_exist_ok=True)
    trainee.save(folder, trained.ema)
    with torch.no_grad():
        trainee.network.set_null(texts.null(1))
    trainee.network.save_null(folder)
    spec.save(folder)
