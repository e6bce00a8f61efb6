"""What all commands share: the workspace, errors in one line, progress bars."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.store import StoreError

Command = Callable[..., Any]


class UserError(click.ClickException):
    """One clear line, and exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"derm: {self.format_message()}", err=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can cause into one line."""
    try:
        with _FullDisk():
            yield
    except (StoreError, ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except ArithmeticError as error:
        from derm_pipeline.training.loop import NonFiniteLossError

        if not isinstance(error, NonFiniteLossError):
            raise
        raise UserError(str(error)) from error
    except RuntimeError as error:
        from derm_pipeline.training.loop import Interrupted

        if not isinstance(error, Interrupted):
            raise
        click.echo(f"derm: {error}", err=True)
        raise SystemExit(128 + signal.SIGTERM) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"no access to {error.filename}: {error.strerror}") from error
        if error.errno is None and str(error):  # said by us, of a server or a model
            raise UserError(str(error)) from error
        raise


class _FullDisk:
    """Says that the disk is full, whoever noticed: Python, safetensors (an error of its own) or Dagster's SQLite."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        cause, seen = error, set[int]()
        while cause is not None and id(cause) not in seen:  # a chain may be a circle
            seen.add(id(cause))
            if _says_disk_full(cause):
                where = getattr(cause, "filename", None) or "while writing"
                raise UserError(
                    f"the disk is full ({where}); free some space (`derm prune` helps) and run the same command again: "
                    "finished work is kept"
                ) from error
            cause = cause.__cause__ or cause.__context__


def _says_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in (os.strerror(errno.ENOSPC), "database or disk is full"))


def with_workspace(command: Command) -> Command:
    """Give a command its workspace: --data, --raw."""

    @click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: os.environ.get("DERM_DATA", "data"),
        show_default="data, or DERM_DATA",
        help="Folder of the store, of your own recipes and of Dagster's database.",
    )
    @click.option(
        "--raw",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: os.environ.get("DERM_RAW"),
        show_default="<data>/raw, or DERM_RAW",
        help="Folder of the sources' own files, one folder a source.",
    )
    @wraps(command)
    def wrapped(data: Path, raw: Path | None, **arguments: Any) -> Any:
        folder, events = Path(data).resolve(), os.environ.get("DERM_TENSORBOARD")
        with user_errors():
            workspace = Workspace(
                data=folder,
                raw=Path(raw).resolve() if raw else folder / "raw",
                tensorboard=Path(events).resolve() if events else None,
            )
            return command(workspace, **arguments)

    return wrapped


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar a stage on a terminal, a line a stage when piped."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def show(stage: str, done: int, total: int, note: str) -> None:
        if not sys.stderr.isatty():
            if done == total:
                click.echo(f"{stage}: {done:,}{', ' + note if note else ''}", err=True)
            return
        bar = bars.get(stage)
        if bar is None or bar.total != total:
            bar = bars[stage] = tqdm(total=total, desc=f"{stage:18}", leave=True, dynamic_ncols=True)
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
