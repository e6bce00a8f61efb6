"""Dagster's own storage for a project folder, and the runs that a killed process left behind."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

PROCESS_TAG = "derm/process"

_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


@contextmanager
def project_instance(folder: Path, data: Path) -> Iterator[dg.DagsterInstance]:
    """The instance that `dagster dev` uses in this folder.

    DAGSTER_HOME where it is set, else the folder's dagster.yaml, else plain files under `data`.
    """
    if os.environ.get("DAGSTER_HOME"):
        instance = dg.DagsterInstance.get()
    elif (folder / "dagster.yaml").is_file():
        instance = dg.DagsterInstance.from_config(str(folder))
    else:
        home = data / "dagster"
        home.mkdir(parents=True, exist_ok=True)
        instance = dg.DagsterInstance.local_temp(str(home))
    with instance:
        yield instance


@contextmanager
def living_process(instance: dg.DagsterInstance, data: Path) -> Iterator[dict[str, str]]:
    """Tags for the runs of this process, which say to later ones whether it still lives.

    The process holds a lock that the kernel releases when it dies, however it dies. Runs of dead processes are declared
    failed first: otherwise their claims on a pool (`gpu`) would make everyone wait for ever.
    """
    folder = data / "dagster" / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    _bury_the_dead(instance, folder)
    path = folder / f"{uuid.uuid4().hex}.lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield {PROCESS_TAG: path.stem}
        finally:
            path.unlink(missing_ok=True)


def _bury_the_dead(instance: dg.DagsterInstance, folder: Path) -> None:
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        process = run.tags.get(PROCESS_TAG)
        if process and not _lives(folder / f"{process}.lock"):
            instance.report_run_failed(run, "The process that ran it died; run it again to resume.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _lives(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("r+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    path.unlink(missing_ok=True)
    return False
