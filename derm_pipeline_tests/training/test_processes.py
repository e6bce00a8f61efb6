"""Several processes: the losses of one, one writer, everybody resumes."""

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import derm_pipeline_tests
from derm_pipeline.training.loop import CHECKPOINT, train
from derm_pipeline_tests.training.small import Regression, config, network, train_as_one_of


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two(work, stop_after=0, **changes):
    """Train in two processes; what each of them got, None of one that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "derm_pipeline_tests.training.small"])
    port = free_port()
    work.mkdir(exist_ok=True)
    arguments = [(index, 2, port, work, changes, stop_after) for index in range(2)]
    processes = [context.Process(target=train_as_one_of, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return results(work)


def results(work):
    paths = [work / f"result-{index}.pt" for index in range(2)]
    return [torch.load(path, weights_only=True) if path.is_file() else None for path in paths]


def alone(work, **changes):
    model = network()
    trained = train(model, Regression(model), config(**changes), work=work, validation=Regression(model))
    return model, trained


CHANGES = {"num_steps": 50, "validate_every_steps": 20, "checkpoint_every_steps": 20, "ema_decays": (0.9,)}


def check_equal(found, model, trained):
    assert found["losses"] == pytest.approx(trained.losses, abs=1e-5)
    assert found["validation"] == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in trained.validation]
    for name, weight in model.state_dict().items():
        assert (weight - found["weights"][name]).abs().max() < 1e-5
        assert (trained.ema[name] - found["ema"][name]).abs().max() < 1e-5


def test_two_processes_give_the_losses_of_one(tmp_path):
    model, trained = alone(tmp_path / "one", **CHANGES)
    first, second = two(tmp_path / "two", **CHANGES)
    check_equal(first, model, trained)
    assert first["losses"] == second["losses"]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    accumulated, _ = two(tmp_path / "micro", **CHANGES, micro_batch_size=2)
    check_equal(accumulated, model, trained)


def test_when_one_is_told_to_stop_both_do_and_both_resume(tmp_path):
    _, straight = two(tmp_path / "a", **CHANGES)
    first, second = two(tmp_path / "b", stop_after=33, **CHANGES)
    assert first == second
    assert "stopped after step 33 of 50" in first["stopped"]
    assert (tmp_path / "b" / CHECKPOINT).is_file()
    for result in two(tmp_path / "b", **CHANGES):
        assert result["resumed"] == 33
        assert result["losses"] == straight["losses"]
        assert all(torch.equal(value, result["ema"][name]) for name, value in straight["ema"].items())


def test_one_process_resumes_what_two_began(tmp_path):
    model, trained = alone(tmp_path / "one", **CHANGES)
    two(tmp_path / "two", stop_after=33, **CHANGES)
    resumed_model, resumed = alone(tmp_path / "two", **CHANGES)
    assert resumed.resumed_from_step == 33
    assert resumed.losses == pytest.approx(trained.losses, abs=1e-5)


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tmp_path):
    for result in two(tmp_path, batch_size=15):
        assert result["stopped"] == "batch_size 15 does not divide over 2 processes; take 16"


@pytest.mark.slow
def test_accelerate_launch_starts_it(tmp_path):
    model, trained = alone(tmp_path / "one", **CHANGES)
    (tmp_path / "two").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "from derm_pipeline_tests.training.small import train_and_leave\n"
        f"train_and_leave(int(os.environ['RANK']), Path(sys.argv[1]), {CHANGES!r})\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--main_process_port", str(free_port()), str(script), str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(Path(derm_pipeline_tests.__file__).parent.parent)}
    subprocess.run([*launch, *options], check=True, timeout=120, env=environment)
    check_equal(results(tmp_path / "two")[0], model, trained)
