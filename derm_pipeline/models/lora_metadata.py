"""What somebody else's configuration says of a LoRA: numbers and names only, since it comes from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_DEFAULTS = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False, "peft_type": "LORA"}
_FOREIGN = ("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices")
_REWRITING = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""How adapters begin that change the base's own weights, of which their files hold nothing."""


def positive_number(value: Any, where: str) -> float:
    """A positive, finite number, of a tensor or of JSON."""
    if not isinstance(value, bool | str) and getattr(value, "numel", lambda: 1)() == 1:
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found) and found > 0:
            return found
    raise ValueError(f"{where} is no number above 0")


class SaidOfLora:
    """The numbers of a configuration of peft's that somebody wrote.

    Raises:
        ValueError: it says something that changes the arithmetic otherwise.
    """

    def __init__(self, config: Mapping[str, Any] | None, where: str) -> None:
        self._config, self._where = config or {}, where
        self.rslora = bool(self._config.get("use_rslora", False))
        targets = self._config.get("target_modules")
        is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        self.targets: tuple[str, ...] = tuple(targets or ()) if is_list else ()
        self._ranks = self._pattern("rank_pattern")
        self._alphas = self._pattern("alpha_pattern")
        foreign = [key for key, usual in _DEFAULTS.items() if self._config.get(key, usual) not in (usual, None)]
        foreign += [key for key in _FOREIGN if self._config.get(key)]
        begins = self._config.get("init_lora_weights")
        foreign += ["init_lora_weights"] if isinstance(begins, str) and begins.lower().startswith(_REWRITING) else []
        if foreign:
            raise ValueError(
                f"{where}: its configuration has {foreign[0]} = {self._config[foreign[0]]!r}, not read here"
            )

    def alpha(self, name: str) -> float | None:
        """Of a layer; None where the configuration does not tell."""
        own = self._matching(self._alphas, name, "lora_alpha")
        return None if own is None else positive_number(own, f"{self._where}: alpha of {name}")

    def check_rank(self, name: str, rank: int) -> None:
        """See that it is that of the tensors."""
        told = self._matching(self._ranks, name, "r")
        if told is not None and told != rank:
            raise ValueError(f"{self._where}: {name} has rank {rank}, and its configuration says {told!r}")

    def _matching(self, pattern: Mapping[str, Any], name: str, otherwise: str) -> Any:
        for words, value in pattern.items():
            is_whole = words.startswith("^")
            if name == words.removeprefix("^") or (not is_whole and name.endswith(f".{words}")):
                return value
        return self._config.get(otherwise)

    def _pattern(self, key: str) -> dict[str, Any]:
        """A pattern of peft's without the regular expressions that it may be made of."""
        found = self._config.get(key) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{self._where}: its configuration's {key} is no table")
        plain = {re.sub(r"\\(.)", r"\1", words): value for words, value in found.items()}
        wild = [words for words in plain if not re.fullmatch(r"\^?[\w.-]*", words)]
        if wild:
            raise ValueError(
                f"{self._where}: {key} {wild[0]!r} is a regular expression; names alone are read from a file"
            )
        return plain
