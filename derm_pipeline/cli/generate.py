"""The command that draws samples from a recipe's generator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from derm_pipeline.cli.shared import UserError, progress_bars, with_workspace
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.store import Artifact, Store

if TYPE_CHECKING:
    from derm_pipeline.generation import OutputFormat, SampleRequest, Sampling
    from derm_pipeline.models.generator import GeneratorSpec

_FORMATS = ("png", "webp", "jpeg", "parquet", "npz", "grid")
_MOST = 1_000_000
"""Samples of one command: each has its row in memory."""
_SOLVERS = ("dpm2m", "unipc", "euler", "ddim", "heun", "ddpm")


@click.command()
@click.option("--recipe", required=True, help="Whose generator: one that `derm run` has materialised.")
@click.option("--diagnosis", "diagnoses", multiple=True, help="Code or words: mel, melanoma. Again for more. [all]")
@click.option("--skin-type", "skin_types", type=click.IntRange(1, 6), multiple=True, help="1 to 6; again for more.")
@click.option("--tell", multiple=True, metavar="NAME=VALUE", help="Another condition of the generator: sex=female.")
@click.option("--prompt", help="Told to a generator of text; alone, no diagnosis is.  [a training caption]")
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Images of each.")
@click.option("--seed", type=int, help="Same seed, same images.  [default: the recipe's]")
@click.option("--guidance", type=click.FloatRange(min=0), help="Above 1 exaggerates.  [default: the recipe's]")
@click.option("--steps", type=click.IntRange(min=1), help="Evaluations an image.  [default: the recipe's]")
@click.option("--solver", type=click.Choice(_SOLVERS), help="The sampler.  [default: the recipe's]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images drawn at once.  [default: the recipe's]")
@click.option("--compile", "compiled", is_flag=True, help="Compile the networks first: pays for thousands on a GPU.")
@click.option("--format", "output", type=click.Choice(_FORMATS), default="png", show_default=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder.  [default: <data>/samples/<recipe>/...]"
)
@with_workspace
def generate(
    workspace: Workspace,
    recipe: str,
    diagnoses: tuple[str, ...],
    skin_types: tuple[int, ...],
    tell: tuple[str, ...],
    prompt: str | None,
    count: int,
    output: OutputFormat,
    out: Path | None,
    **settings: Any,
) -> None:
    r"""Draw images from a recipe's generator into a folder, each with its provenance.

    Interrupted, the same command goes on where it was; run twice at once, the two share the work.

    \b
    derm generate --recipe quickstart --diagnosis melanoma --skin-type 5 --count 50
    derm generate --recipe dit_text --diagnosis melanoma --prompt "a dermoscopic image of melanoma on the back"
    derm generate --recipe quickstart --count 8 --format grid      a row a diagnosis, a column a seed
    derm generate --recipe quickstart --count 1000 --format npz    arr_0 for ADM's evaluator
    """
    from derm_pipeline.defs.stages.texts import requests_in_words
    from derm_pipeline.generation import check_requests, generate_folder, name_of, request_of
    from derm_pipeline.models.generator import GeneratorSpec

    config = _config(workspace, recipe, settings)
    made = _networks(workspace.store, recipe)
    spec = GeneratorSpec.load(made["generator"].directory)
    if config.solver == "ddpm" and spec.law.kind != "ddpm":
        raise UserError('--solver "ddpm" needs a generator of law ddpm; that of this recipe is a flow: take "dpm2m"')
    is_grid = output == "grid"
    requests = _requests(spec, diagnoses, skin_types, tell, prompt, count, config, same_noise=is_grid)
    if spec.network.kind != "pretrained":  # what that one is asked for is words
        check_requests(requests, spec, has_text=True)
    requests, embed_text = requests_in_words(workspace.store, made["generator"], requests)
    check_requests(requests, spec, has_text=True)
    request = request_of(requests, config, output, recipe=recipe, **made)
    folder = (out or workspace.data / "samples" / recipe / name_of(request)).resolve()
    with progress_bars() as show:
        is_new = generate_folder(
            folder,
            requests,
            config,
            output,
            recipe=recipe,
            generator=made["generator"],
            autoencoder=made["autoencoder"],
            licences=_licences(workspace, recipe),
            columns=count * max(1, len(set(skin_types))),
            embed_text=embed_text,
            on_progress=lambda done, total: show("samples", done, total, ""),
        )
    click.echo(f"{len(requests):,} images ({output}){'' if is_new else ', there already'}: {folder}")


def _networks(store: Store, recipe: str) -> dict[str, Artifact]:
    """The recipe's generator, and the autoencoder that it learnt with: the recipe's own may be a newer one by now."""
    from derm_pipeline.defs.stages.fitting import autoencoder_of

    if not store.has("generator", recipe):
        raise UserError(f"generator/{recipe} is not a finished artifact: `derm run {recipe}` makes it")
    generator = store.current("generator", recipe)
    reference = autoencoder_of(store, generator)
    autoencoder = store.get(reference)
    if autoencoder is None:
        raise UserError(f"{reference}, with which {generator.reference} learnt, is gone: run the recipe again")
    return {"generator": generator, "autoencoder": autoencoder}


def _config(workspace: Workspace, recipe: str, settings: dict[str, Any]) -> Sampling:
    """The recipe's own settings, but for what the command says; of a plan of prompts those of any prompt."""
    from pydantic import ValidationError

    from derm_pipeline.generation import PromptSampling

    names = {"steps": "num_steps", "compiled": "compile"}
    said = {names.get(name, name): value for name, value in settings.items() if value is not None}
    recipes_own = workspace.recipe(recipe).synthetic_dataset
    kind: type[Sampling] = type(recipes_own)
    if isinstance(recipes_own, PromptSampling):
        kind = PromptSampling
    try:
        return kind.model_validate(recipes_own.model_dump(include=set(kind.model_fields)) | said)
    except ValidationError as error:
        options = {name: option for option, name in names.items()}
        key, *_ = error.errors()[0]["loc"] or ("settings",)
        raise UserError(f"--{options.get(str(key), str(key)).replace('_', '-')}: {error.errors()[0]['msg']}") from error


def _licences(workspace: Workspace, recipe: str) -> list[str]:
    sources = [workspace.sources[name] for name in workspace.recipe(recipe).sources]
    return [f"{source.title}: {source.licence}" for source in sources]


def _requests(
    spec: GeneratorSpec,
    diagnoses: tuple[str, ...],
    skin_types: tuple[int, ...],
    tell: tuple[str, ...],
    prompt: str | None,
    count: int,
    config: Sampling,
    *,
    same_noise: bool,
) -> list[SampleRequest]:
    from derm_pipeline.generation import diagnosis_called, requests_of_cells

    known = [Diagnosis(value) for value in spec.classes["diagnosis"]]
    named: list[Diagnosis | None] = [*dict.fromkeys(diagnosis_called(words, known) for words in diagnoses)]
    asked = named or ([None] if prompt else known)
    of_skin_types: list[SkinType | None] = [*map(SkinType, dict.fromkeys(skin_types))] or [None]
    num_samples = len(asked) * len(of_skin_types) * count
    if num_samples > _MOST:
        raise UserError(f"--count {count:,}: {num_samples:,} samples in all; at most {_MOST:,} go into one folder")
    return requests_of_cells(
        asked,
        of_skin_types,
        count,
        config.seed,
        further=_further(tell),
        text=prompt,
        same_noise=same_noise,
    )


def _further(tell: tuple[str, ...]) -> dict[str, str]:
    pairs = [said.partition("=") for said in tell]
    wrong = [name + sign + value for name, sign, value in pairs if not (name and sign and value)]
    wrong += [f"{name} (it has an option of its own)" for name, _, _ in pairs if name in ("diagnosis", "skin_type")]
    told = [name for name, _, _ in pairs]
    twice = [name for name in told if told.count(name) > 1]
    if twice:
        raise UserError(f"--tell {twice[0]}: one value for all; run the command once for each")
    if wrong:
        raise UserError(f"--tell {wrong[0]}: say NAME=VALUE, as sex=female")
    return {name: value for name, _, value in pairs}
