"""Embeddings of all texts of a recipe, made once before a stage that does not change what a text means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from derm_pipeline.latents.text_cache import Embeddings, open_embeddings, write_embeddings
from derm_pipeline.models.pretrained.adapted import is_text_adapted, put_text, trained_files
from derm_pipeline.models.pretrained.base import Base, load_base_of
from derm_pipeline.models.pretrained.config import Part
from derm_pipeline.models.runtime import join_processes
from derm_pipeline.store import digest_of_file, write_json

_CUT = "cut.json"
_TEXT: tuple[Part, ...] = ("text",)


class StageEmbeddings:
    """By a base's text encoders, as the stages before left them."""

    def __init__(self, base: Base, before: Path | None) -> None:
        """`base` need not have its text encoders; `before` is the generator that the stages before left."""
        self._base = base
        self._before = before if before is not None and is_text_adapted(before) else None

    @property
    def is_published(self) -> bool:
        """Whether texts mean what they mean to the base."""
        return self._before is None

    @property
    def identity(self) -> dict[str, Any]:
        """What embeddings depend on."""
        if self._before is None:
            return self._base.text_identity
        names = trained_files(self._before, ("text",))
        return self._base.text_identity | {"trained": {name: digest_of_file(self._before / name) for name in names}}

    def obtain(
        self, folder: Path, texts: Sequence[str], captions: Sequence[str], device: torch.device
    ) -> tuple[Embeddings, int]:
        """The embeddings in a folder, made there first where they are missing; and how many captions are cut.

        The text encoders are loaded for this only.
        """
        processes = join_processes()
        if processes.is_main_process and not (folder / _CUT).is_file():
            self._make(folder, texts, captions, device)
        processes.wait_for_everyone()
        return open_embeddings(folder), json.loads((folder / _CUT).read_text())

    def _make(self, folder: Path, texts: Sequence[str], captions: Sequence[str], device: torch.device) -> None:
        base = load_base_of(self._base.reference, device, parts=_TEXT)
        if self._before is not None:
            put_text(self._before, base.text_encoders, base.tokenizers)
        write_embeddings(folder, texts, base.embed, encoder=self.identity)
        write_json(folder / _CUT, num_cut(base, captions))


def num_cut(base: Base, captions: Sequence[str]) -> int:
    """How many captions are longer than the base takes."""
    return sum(num > 0 for num in base.tokenise(captions).num_cut)
