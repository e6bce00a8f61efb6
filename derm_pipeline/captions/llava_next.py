"""LLaVA-NeXT as a captioner (Liu et al. 2024), through transformers: a hub id or a folder with the model's files.

Only safetensors are read and no code of the model's is run. Each row of a batch samples with its own generator, so an
answer is that of its image and seed, whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from derm_pipeline.captions.prompted import PromptedConfig, within_bounds
from derm_pipeline.captions.prompts import Answer, Question

if TYPE_CHECKING:
    import torch


class LlavaNextConfig(PromptedConfig):
    """Which LLaVA-NeXT, and how it runs."""

    HOW_IT_RUNS: ClassVar[frozenset[str]] = frozenset({"batch_size", "device", "device_map", "offline"})

    kind: Literal["llava_next"] = "llava_next"
    """Which captioner."""
    model: str = "llava-hf/llama3-llava-next-8b-hf"
    """Hub id, or folder with the model and its processor."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is its main branch."""
    offline: bool = False
    """Look in the local cache only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the weights; auto is as they are stored."""
    bits: Literal[4, 8] | None = None
    """Weights in 4 or 8 bits, by bitsandbytes; None as `dtype` says."""
    device: str = "auto"
    """Where it runs ("cpu", "cuda", "cuda:1", "mps"); auto is a GPU where there is one."""
    device_map: str | None = None
    """Spread over several devices by accelerate ("auto", "balanced"); then `device` is not looked at."""
    top_k: int = Field(default=50, ge=1)
    """Sample among as many of the likeliest tokens."""

    @model_validator(mode="after")
    def _hub_or_folder(self) -> LlavaNextConfig:
        if not self.model.strip():
            raise ValueError("model is empty; give a hub id or a folder")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings on which the captions depend; a folder counts by what it holds, not by where it lies."""
        folder = Path(self.model)
        return super().identity() | ({"model": _fingerprint(folder)} if folder.is_dir() else {})


_SAMPLE_BYTES = 2**16
_NUM_SAMPLES = 64


def _fingerprint(folder: Path) -> str:
    """A digest of the files of a model: names, sizes, and their bytes, of large ones 64 samples of 64 KiB."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        step = max(_SAMPLE_BYTES, size // _NUM_SAMPLES)
        with path.open("rb") as handle:
            for start in range(0, size, step):
                handle.seek(start)
                digest.update(handle.read(_SAMPLE_BYTES))
    return f"files:{digest.hexdigest()[:16]}"


class LlavaNextCaptioner:
    """Answers by a LLaVA-NeXT in this process. The weights are read when it is made."""

    name = "llava_next"

    def __init__(self, config: LlavaNextConfig | None = None) -> None:
        """Read the model.

        Raises:
            FileNotFoundError: the model is not there; the message says where it was looked for and how to get it.
            ValueError: what is there is no LLaVA-NeXT with its processor, or bitsandbytes is asked for and missing.
        """
        self.config = config or LlavaNextConfig()
        self.model = self.config.model
        self._processor, self._network = _load(self.config)
        commit = getattr(self._network.config, "_commit_hash", None) or self.config.revision
        if commit:
            self.model += f"@{commit}"
        self._eos = _token_ids(
            self._network.generation_config.eos_token_id, self._processor.tokenizer.eos_token_id
        )  # Llama 3 has two
        if self._processor.tokenizer.pad_token_id is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `PromptedCaptioner.answer`; asked in batches of `batch_size`."""
        size = self.config.batch_size
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        return [answer for batch in batches for answer in self._answer_batch(batch)]

    def _answer_batch(self, questions: Sequence[Question]) -> list[Answer]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        inputs = self._inputs(questions)
        sampler = RowSampler(
            [question.seed for question in questions], self.config.temperature, self.config.top_k, self.config.top_p
        )
        # A configuration of our own: that of the checkpoint may hold beams, penalties or other lengths.
        generation = GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self._eos) or None,
            pad_token_id=self._processor.tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            output = self._network.generate(
                **inputs, generation_config=generation, logits_processor=LogitsProcessorList([sampler])
            )
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._read(tokens) for tokens in new_tokens]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        texts = [
            self._processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt.text}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        images = [within_bounds(question.image, self.config.max_pixels) for question in questions]
        inputs = self._processor(
            images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        return inputs.to(self._network.device, self._network.dtype)

    def _read(self, tokens: list[int]) -> Answer:
        """The answer in the new tokens of one row: what comes before the end, and whether there is an end."""
        end = next((place for place, token in enumerate(tokens) if token in self._eos), None)
        text = self._processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Answer(text.strip(), is_complete=end is not None)


class RowSampler:
    """A logits processor by which the likeliest token is a sample: each row draws from its own generator.

    Temperature, the `top_k` likeliest, among them the likeliest that hold `top_p`; then Gumbel noise is added, and the
    argmax of logits plus Gumbel noise is distributed as their softmax (Gumbel 1954; Maddison et al. 2014). To be used
    with `do_sample=False`. The noise is drawn on the CPU, so that every device draws the same.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int, top_p: float) -> None:
        import torch

        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, tokens) -> scores whose argmax is the sample; `input_ids` (rows, length) is not looked at."""
        import torch

        if self._temperature == 0:
            return scores
        scores = scores.float() / self._temperature
        likeliest = scores.topk(min(self._top_k, scores.shape[-1])).values  # (rows, top_k), falling
        probabilities = likeliest.softmax(-1)
        is_within = probabilities.cumsum(-1) - probabilities < self._top_p  # the first always is
        least = likeliest.masked_fill(~is_within, torch.inf).min(-1, keepdim=True).values
        noise = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self._generators]
        )
        gumbel = -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
        return torch.where(scores >= least, scores + gumbel.to(scores.device), -torch.inf)


def _token_ids(*given: int | list[int] | None) -> frozenset[int]:
    """All ids given, each None, one or several."""
    return frozenset(token for ids in given if ids is not None for token in (ids if isinstance(ids, list) else [ids]))


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _load(config: LlavaNextConfig) -> tuple[Any, Any]:
    """The processor and the network, ready to answer."""
    from safetensors import SafetensorError
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    if not Path(config.model).is_dir() and not _HUB_ID.fullmatch(config.model):
        raise FileNotFoundError(
            f"the LLaVA-NeXT model is looked for in the folder {config.model}, which is not there, and it is no hub id"
        )
    device = _device(config.device)
    quantised = _quantised(config)
    where: dict[str, Any] = {
        "revision": config.revision or "main",
        "local_files_only": _from_disk_only(config),
        "trust_remote_code": False,
    }
    try:
        kind = _kind(config.model, where)
        if kind != "llava_next":
            raise ValueError(f"{config.model} holds a model of type {kind!r}; a llava_next is needed")
        processor = LlavaNextProcessor.from_pretrained(config.model, **where)
        network: Any = LlavaNextForConditionalGeneration.from_pretrained(
            config.model, dtype=config.dtype, use_safetensors=True, **quantised, **where
        )
    except OSError as error:
        raise FileNotFoundError(_not_there(config, error)) from error
    except SafetensorError as error:
        raise ValueError(f"the weights of {config.model} are broken ({error}); get them again") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"the processor of {config.model} has no chat template (chat_template.jinja)")
    if not quantised:
        network = network.to(device)
    return processor, network.eval()


_HUB_TIMEOUT_S = 10


def _from_disk_only(config: LlavaNextConfig) -> bool:
    """Whether only what lies here is read: the hub is asked once; transformers would ask for half a minute a file.

    Raises:
        FileNotFoundError: the model is no folder, not in the cache, and the hub does not give it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(config.model).is_dir():
        return True
    problem: Exception | None = None
    unreachable: tuple[type[Any], ...] = (OSError, *HfHubHTTPError.__bases__)  # of the HTTP library that it uses
    if not config.offline:
        try:
            HfApi().model_info(config.model, revision=config.revision, timeout=_HUB_TIMEOUT_S)
            return False
        except unreachable as error:
            problem = error
    if isinstance(try_to_load_from_cache(config.model, "config.json", revision=config.revision), str):
        return True
    raise FileNotFoundError(_not_there(config, problem)) from problem


def _kind(model: str, where: dict[str, Any]) -> str:
    """The type of model that its config.json names."""
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(model, **where).model_type)
    except ValueError as error:  # no config.json, or one of another library
        raise OSError(str(error)) from error


def _quantised(config: LlavaNextConfig) -> dict[str, Any]:
    """What places the weights, where that is not one device."""
    if config.bits is None:
        return {} if config.device_map is None else {"device_map": config.device_map}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"bits: {config.bits} needs the package bitsandbytes, which is not installed (pip install it)")
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=config.bits == 4, load_in_8bit=config.bits == 8)
    placed = config.device_map or ("auto" if config.device == "auto" else {"": config.device})
    return {"quantization_config": bits, "device_map": placed}


def _device(name: str) -> str:
    """The device by its name.

    Raises:
        ValueError: torch knows no such device, or there is none here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"device: {name!r} cannot be used here ({reason}); give auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return name


def _not_there(config: LlavaNextConfig, error: Exception | None) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = str(error or "").strip().splitlines()[0][:300] if error else ""
    if Path(config.model).is_dir():
        return f"the folder {config.model} holds no complete LLaVA-NeXT with safetensors and processor: {reason}"
    tried = "and offline is set" if config.offline else f"and cannot be downloaded ({reason.rstrip('.')})"
    return (
        f"the LLaVA-NeXT model {config.model} (revision {config.revision or 'main'}) is no folder here, is not in the "
        f"Hugging Face cache {HF_HUB_CACHE}, {tried}. Get it where there is a network "
        f"(`hf download {config.model}`), or give a folder that holds it."
    )
