"""A captioner behind any server that speaks OpenAI's chat completions (vLLM, SGLang, transformers serve, OpenAI).

Many questions at once; throttling, time-outs and broken connections are retried with a growing pause, a bounded number
of times. An answer that makes no sense is an empty answer, which the gate refuses.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from derm_pipeline.captions.prompted import PromptedConfig, within_bounds
from derm_pipeline.captions.prompts import Answer, Prompt, Question
from derm_pipeline.images import encode_jpeg

_MAX_ANSWER_CHARACTERS = 20_000


class OpenAiConfig(PromptedConfig):
    """Which server and model, and how they are asked."""

    HOW_IT_RUNS: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "base_url", "api_key_env", "concurrency", "timeout_s", "max_retries"}
    )

    kind: Literal["openai"] = "openai"
    """Which captioner."""
    base_url: str
    """Where the server is, with the version: "http://gpu-1:8000/v1"."""
    model: str = Field(min_length=1)
    """The model's name on that server."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key, never the key itself; the caller reads it. None for a server
    without keys."""
    batch_size: int = Field(default=32, ge=1)
    """Images asked about at once; as many answers are lost when the work is interrupted."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests under way at the same time."""
    timeout_s: float = Field(default=120, gt=0)
    """For one request, seconds."""
    max_retries: int = Field(default=6, ge=0, le=50)
    """How often a request is repeated after 408, 409, 429, 5xx, a time-out or a broken connection. The pause grows from
    0.5 to 8 s; a server's Retry-After of up to 2 minutes is kept to."""
    jpeg_quality: int = Field(default=92, ge=1, le=100)
    """Of the image as it is sent."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample among as many of the likeliest tokens; only some servers take it (vLLM does, OpenAI does not)."""

    @field_validator("base_url")
    @classmethod
    def _http(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {value!r}; it must begin with http:// or https://")
        if "@" in value or "?" in value:  # it stands in messages, where no secret may
            raise ValueError("base_url holds a user, a password or a query; name a key by api_key_env instead")
        return value


class OpenAiCaptioner:
    """Answers by a model on a server."""

    name = "openai"

    def __init__(self, config: OpenAiConfig, *, api_key: str | None = None) -> None:
        """A client of the server, which is not asked yet.

        Args:
            config: Which server and model.
            api_key: The key itself, where the server wants one.

        Raises:
            ValueError: the package openai is not installed, or a key is named in the settings and not given.
        """
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "the captioner `openai` needs the package openai: pip install 'derm_pipeline[openai]'"
            ) from error
        if config.api_key_env and not api_key:
            raise ValueError(
                f"the environment variable {config.api_key_env} with the key of {config.base_url} is empty"
            )
        self.config = config
        self.model = config.model
        self._openai = openai
        # The package would fill what is left out from OPENAI_* variables, which are meant for another server.
        unsaid = openai.Omit()
        self._client = openai.OpenAI(
            api_key=api_key or "none",
            base_url=config.base_url,
            timeout=config.timeout_s,
            max_retries=config.max_retries,
            default_headers={"OpenAI-Organization": unsaid, "OpenAI-Project": unsaid},  # type: ignore[dict-item]  # Omit is taken, though not declared
        )
        self._secret = api_key

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `PromptedCaptioner.answer`; `concurrency` requests at a time.

        Raises:
            PermissionError: the server refuses the key.
            ValueError: it does not know the address or the model, or answers nothing that can be used, not even a
                plain question about a grey image.
            ConnectionError: it cannot be reached, or stays too busy.
        """
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            answers = list(pool.map(self._ask, questions))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        # An image may be too much for a server; one that cannot say what grey is answers nobody.
        if answers and all(answer.problem for answer in answers) and not self._is_alive():
            raise ValueError(f"{self.config.base_url} answers no question: {answers[0].problem}")
        return answers

    def _is_alive(self) -> bool:
        return any(not self._ask(_PLAIN_QUESTION).problem for _ in range(_PLAIN_TRIES))

    def _ask(self, question: Question) -> Answer:
        openai, url = self._openai, self.config.base_url
        try:
            request, create = self._request(question), self._client.chat.completions.with_raw_response.create
            for _ in range(min(self.config.max_retries, _MAX_MALFORMED)):
                answer = read_answer(create(**request).text)
                if not answer.problem.startswith(_MALFORMED):
                    return answer
            return read_answer(create(**request).text)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            said = f"{url} refuses the key ({self._short(error)}); see api_key_env"
            raise PermissionError(said) from self._cause(error)
        except openai.NotFoundError as error:
            raise ValueError(
                f"{url} does not know the address or the model {self.model!r} ({self._short(error)})"
            ) from self._cause(error)
        except (openai.RateLimitError, openai.APIConnectionError) as error:
            said = f"{url} did not answer in {self.config.max_retries + 1} tries ({self._short(error)})"
            raise ConnectionError(said) from self._cause(error)
        except openai.APIStatusError as error:
            if error.status_code in (502, 503, 504):
                raise ConnectionError(f"{url} is down ({self._short(error)})") from self._cause(error)
            return Answer("", None, f"refused: {self._short(error)}")

    def _request(self, question: Question) -> dict[str, Any]:
        image = within_bounds(question.image, self.config.max_pixels)
        data = base64.b64encode(encode_jpeg(image, quality=self.config.jpeg_quality)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
            {"type": "text", "text": question.prompt.text},
        ]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "seed": question.seed,
            "extra_body": {} if self.config.top_k is None else {"top_k": self.config.top_k},
        }

    def _cause(self, error: Exception) -> Exception | None:
        """The error, to be raised from; None where it would carry the key into a log."""
        return None if self._secret and self._secret in str(error) else error

    def _short(self, error: Exception) -> str:
        """The error's first words, without the key, which some servers repeat."""
        words = " ".join(str(error).split())
        return (words.replace(self._secret, "***") if self._secret else words)[:200]


_PLAIN_QUESTION = Question(
    np.full((64, 64, 3), 128, np.uint8), Prompt("Which colour is this image?", opening="", label=None), seed=0
)
_PLAIN_TRIES = 3
_MALFORMED = "malformed response"
_MAX_MALFORMED = 3
"""So often is a question repeated, with the same seed, whose response makes no sense: a fault of the way, not of the
captioner, which leaves no trace in the table."""


def read_answer(body: str) -> Answer:
    """The answer in a response's body; an empty one that says what is wrong where there is none."""
    try:
        choice = json.loads(body)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return Answer("", None, f"{_MALFORMED} ({type(error).__name__}): {body[:60]!r}")
    if isinstance(text, list):  # content in parts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        return Answer("", None, f"the response holds no text ({finish})")
    return Answer(text[:_MAX_ANSWER_CHARACTERS].strip(), {"stop": True, "length": False}.get(str(finish)))
