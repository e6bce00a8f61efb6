"""Where the files of a pretrained model lie: a folder here, or the hub through its cache. Opens none of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from derm_pipeline.store import digest_of_file

CONFIG_FILE = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S = 10


class Wanted(Protocol):
    """What is read of a model's settings."""

    @property
    def model(self) -> str: ...
    @property
    def subfolder(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def offline(self) -> bool: ...


class Choice(NamedTuple):
    """Which of the files that there are make the model."""

    chosen: list[str]
    """Their names, paths within the model in its own form ("vae/config.json")."""
    missing: list[str]
    """Names of what is needed and not there; the model cannot be used without."""


Choose = Callable[[Collection[str]], Choice]
"""Names of the files that there are -> those that make the model."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    where: str
    """Where they were found, for messages."""
    paths: dict[str, Path]
    """By name within the model."""
    commit: str | None = None
    """On the hub."""

    def digests(self) -> dict[str, str]:
        """sha256 of every file, by name."""
        return {name: digest_of_file(path) for name, path in self.paths.items()}


def check_subfolder(subfolder: str | None) -> str | None:
    """The subfolder of a model's settings, plainly written: "vae" for "./vae/".

    Raises:
        ValueError: it leads out of the model.
    """
    if subfolder is None:
        return None
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"subfolder {subfolder!r} is no folder inside the model")
    return str(path)


def check_same(found: Mapping[str, str], expected: Mapping[str, str], *, what: str, where: str, asset: str) -> None:
    """See that files found are those that were used before, both sha256 by name.

    Raises:
        ValueError: they differ; the message says which.
    """
    changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if changed:
        raise ValueError(
            f"the {what} at {where} is not the one that was used before ({', '.join(changed)} differ): put "
            f"the files back, or materialise `{asset}` and what follows it again"
        )


def find_model(wanted: Wanted, choose: Choose, what: str) -> ModelFiles:
    """A model's files, downloaded where they must be.

    Args:
        wanted: its settings.
        choose: which files make it.
        what: it is, for messages: "autoencoder".

    Raises:
        FileNotFoundError: they are not there; the message says where they were looked for.
    """
    here = Path(wanted.model)
    if here.is_dir():
        return _in_folder(here, wanted, choose, what)
    if not _HUB_ID.fullmatch(wanted.model):
        kind = "file" if here.suffix else "folder"
        raise FileNotFoundError(
            f"the {what} is looked for in the {kind} {here.absolute()}, which is not there, and it is no hub id"
        )
    return _on_hub(wanted, choose, what)


def _in_folder(root: Path, wanted: Wanted, choose: Choose, what: str) -> ModelFiles:
    folder = root / wanted.subfolder if wanted.subfolder else root
    if not folder.is_dir():
        raise FileNotFoundError(f"the {what} is looked for in the folder {folder.absolute()}, which is not there")
    choice = choose(_names_in(root, wanted))
    if choice.missing:
        missing = " and no ".join(name.rpartition("/")[2] for name in choice.missing)
        raise FileNotFoundError(
            f"the folder {folder.absolute()} has no {missing} (only safetensors are read); it holds "
            f"{some(sorted(path.name for path in folder.iterdir()))}"
        )
    return ModelFiles(str(folder), {name: root / name for name in choice.chosen})


def _names_in(root: Path, wanted: Wanted) -> list[str]:
    """Names of a model's files: at most one folder deep, and in its subfolder."""
    patterns = {"*", "*/*", *([f"{wanted.subfolder}/*"] if wanted.subfolder else [])}
    return sorted({path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern)})


def _on_hub(wanted: Wanted, choose: Choose, what: str) -> ModelFiles:
    """From the cache at once where nothing can have changed there, else as the hub has it, else from the cache."""
    revision = wanted.revision or "main"
    is_fixed = bool(_COMMIT.fullmatch(revision))
    problem: Exception | None = None
    if not wanted.offline and not (is_fixed and _in_cache(wanted, revision, choose)):
        from huggingface_hub.errors import HfHubHTTPError

        unreachable: tuple[type[Any], ...] = (OSError, *HfHubHTTPError.__bases__)  # of the HTTP library that it uses
        try:
            return _download(wanted, revision, choose)
        except _NotOnHubError as error:
            raise FileNotFoundError(str(error)) from error
        except unreachable as error:
            problem = error
    found = _in_cache(wanted, revision, choose)
    if found is None:
        raise FileNotFoundError(_not_there(wanted, revision, choose, what, problem)) from problem
    return found


class _NotOnHubError(LookupError):
    """The hub has the model, but not these files of it."""


def _download(wanted: Wanted, revision: str, choose: Choose) -> ModelFiles:
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(wanted.model, revision=revision, timeout=_HUB_TIMEOUT_S)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    choice = choose(there)
    if choice.missing:
        raise _NotOnHubError(
            f"{wanted.model} (revision {revision}) on the hub has no {' and no '.join(choice.missing)}; it holds "
            f"{some(sorted(there))}"
        )
    cache = huggingface_hub.constants.HF_HUB_CACHE
    paths = {
        name: Path(huggingface_hub.hf_hub_download(wanted.model, name, revision=info.sha, cache_dir=cache))
        for name in choice.chosen
    }
    return ModelFiles(f"{wanted.model}@{info.sha}", paths, info.sha)


def _in_cache(wanted: Wanted, revision: str, choose: Choose) -> ModelFiles | None:
    from huggingface_hub import constants, try_to_load_from_cache

    config = f"{wanted.subfolder}/{CONFIG_FILE}" if wanted.subfolder else CONFIG_FILE
    found = try_to_load_from_cache(wanted.model, config, revision=revision, cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(found, str):
        return None
    root = Path(found)
    for _ in PurePosixPath(config).parts:
        root = root.parent
    choice = choose(_names_in(root, wanted))
    if choice.missing:
        return None
    commit = root.name if _COMMIT.fullmatch(root.name) else None
    paths = {name: root / name for name in choice.chosen}
    return ModelFiles(f"{wanted.model}@{commit or revision}", paths, commit)


def _not_there(wanted: Wanted, revision: str, choose: Choose, what: str, problem: Exception | None) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = next(iter(str(problem or "").strip().splitlines()), "")[:300].rstrip(".")
    tried = f"and cannot be downloaded ({reason})" if problem else "and offline is set"
    return (
        f"the {what} {wanted.model} (revision {revision}) is no folder here, its "
        f"{' and '.join(choose(()).missing)} are not in the Hugging Face cache {HF_HUB_CACHE}, {tried}. Get it where "
        f"there is a network (`hf download {wanted.model}`), or give a folder that holds it."
    )


def some(names: list[str]) -> str:
    """The first few of these names, in words."""
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
