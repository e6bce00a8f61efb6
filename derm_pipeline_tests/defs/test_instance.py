"""Dagster's storage for a project, and the claims that a killed process leaves behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from derm_pipeline.defs.instance import PROCESS_TAG, living_process, project_instance

REPOSITORY = Path(__file__).parents[2]


@dg.op
def nothing():
    pass


@dg.job
def job():
    nothing()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with the repository's own dagster.yaml."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(instance, tags):
    """A run that has begun and claimed the pool's only slot."""
    run = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    assert storage.claim_concurrency_slot("gpu", run.run_id, "nothing").is_claimed
    return run


def test_a_project_keeps_its_history_in_its_own_folder(folder):
    with project_instance(folder, folder / "data") as instance:
        run_id = instance.create_run_for_job(job).run_id
    assert (folder / "data" / "dagster").is_dir()
    with project_instance(folder, folder / "data") as instance:
        assert [run.run_id for run in instance.get_runs()] == [run_id]
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1
        assert not instance.telemetry_enabled


def test_a_folder_without_settings_keeps_it_with_its_data(tmp_path, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for count in (1, 2):
        with project_instance(tmp_path, tmp_path / "data") as instance:
            instance.create_run_for_job(job)
            assert len(instance.get_runs()) == count
    assert (tmp_path / "data" / "dagster" / "history").is_dir()


def test_the_runs_of_a_dead_process_are_failed_and_give_back_the_pool(folder):
    program = (
        "import os, sys; from pathlib import Path\n"
        "from derm_pipeline.defs.instance import living_process, project_instance\n"
        "from derm_pipeline_tests.defs.test_instance import begun\n"
        "folder = Path(sys.argv[1])\n"
        "with project_instance(folder, folder / 'data') as instance:\n"
        "    with living_process(instance, folder / 'data') as tags:\n"
        "        begun(instance, tags)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    dead = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=folder, env=environment)
    assert dead.returncode == -9
    with project_instance(folder, folder / "data") as instance:
        [run] = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 1
        with living_process(instance, folder / "data"):
            assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
            assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0


def test_the_runs_of_a_living_process_and_of_others_are_left_alone(folder):
    with project_instance(folder, folder / "data") as instance:
        other = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)  # of `dagster dev`
        with living_process(instance, folder / "data") as tags:
            mine = begun(instance, tags)
            with living_process(instance, folder / "data") as others:
                assert others[PROCESS_TAG] != tags[PROCESS_TAG]
                for run in (mine, other):
                    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.STARTED
                assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 1
    assert list((folder / "data" / "dagster" / "processes").iterdir()) == []
