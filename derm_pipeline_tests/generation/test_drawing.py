"""Drawing: the same samples to the last bit however they are drawn, killed or shared; refused before any work."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from derm_pipeline.generation import SamplingConfig, draw_samples, drawing, plan_samples, requests_of_cells
from derm_pipeline.models.laws import DDPM
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline_tests.generation.networks import SEVEN, generator_at

SHAPES = (
    {"width": 192, "heads": 3, "latent_size": 16},
    {"width": 100, "heads": 5, "latent_size": 12, "patch": 4},
    {"width": 36, "heads": 3, "latent_size": 5, "patch": 1, "channels": 3, "qk_norm": True},
    {"width": 64, "heads": 2, "latent_size": 6, "channels": 6, "mlp_ratio": 3.3},
)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return generator_at(tmp_path_factory.mktemp("networks"))


def config_of(**changes):
    return SamplingConfig(**{"num_samples": 21, "num_steps": 3, "batch_size": 8} | changes)


def draw(requests, config, networks, work, on_progress=None):
    work.mkdir(exist_ok=True, parents=True)
    return draw_samples(requests, config, **networks, work=work, on_progress=on_progress)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"width {shape['width']}")
def test_a_sample_is_the_same_to_the_last_bit_in_any_batch_and_order_and_alone(shape, precision, tmp_path):
    rng = random.Random()
    seed = rng.randrange(2**31)
    networks = generator_at(tmp_path / f"seed {seed}", seed=seed, autoencoder={"width": 8 * rng.randint(1, 6)}, **shape)
    config = config_of(num_samples=19, precision=precision, seed=seed, num_steps=2)
    requests = plan_samples(config, SEVEN, {})
    images = draw(requests, config, networks, tmp_path / "whole")
    for batch_size in (1, 7, 64):
        order = rng.sample(range(19), 19 if batch_size > 1 else 4)
        again = draw(
            [requests[place] for place in order],
            config.model_copy(update={"batch_size": batch_size}),
            networks,
            tmp_path / f"batch {batch_size}",
        )
        assert np.array_equal(again, images[order]), (seed, batch_size)


def test_a_network_that_treats_rows_unequally_is_asked_for_one_at_a_time(networks, tmp_path, monkeypatch):
    class Unequal(drawing.Drawer):
        def _evaluate(self, batch):
            images = super()._evaluate(batch)
            sizes.append(len(images))
            return images + 0.01 * torch.arange(len(images))[:, None, None, None]

    sizes = []
    monkeypatch.setattr(drawing, "Drawer", Unequal)
    requests = plan_samples(config_of(), SEVEN, {})
    images = draw(requests, config_of(), networks, tmp_path / "a")
    assert sizes == [drawing.CPU_CHUNK] + [1] * 21
    assert np.array_equal(draw(requests[5:7], config_of(), networks, tmp_path / "b"), images[5:7])


def test_threads_change_no_sample_and_are_left_as_they_were(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    before, images = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            images.append(draw(requests, config_of(precision="fp32"), networks, tmp_path / str(num_threads)))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_a_sample_depends_on_its_seed_and_what_is_told(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    images = draw(requests, config_of(), networks, tmp_path / "a")
    assert images.shape == (21, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 21
    changed = [
        dataclasses.replace(requests[0], seed=1),
        dataclasses.replace(requests[0], diagnosis=Diagnosis.VASC),
        dataclasses.replace(requests[0], skin_type=None),
    ]
    different = draw(changed, config_of(), networks, tmp_path / "c")
    assert all(np.abs(image.astype(int) - images[0]).max() > 3 for image in different)
    renumbered = draw([dataclasses.replace(requests[3], number=900)], config_of(), networks, tmp_path / "d")
    assert np.array_equal(renumbered[0], images[3])


def test_without_guidance_no_null_half_is_evaluated(networks, tmp_path, monkeypatch):
    rows = []

    def count(*arguments, **named):
        spec, network = load(*arguments, **named)
        network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        return spec, network

    load = drawing.load_network
    monkeypatch.setattr(drawing, "load_network", count)
    requests = plan_samples(config_of(num_samples=8), SEVEN, {})
    draw(requests, config_of(guidance=1.0), networks, tmp_path / "a")
    assert set(rows) == {8}
    rows.clear()
    draw(requests, config_of(num_steps=4, guidance_interval=(0.5, 4)), networks, tmp_path / "b")
    assert set(rows) == {8, 16}
    rows.clear()
    draw(requests, config_of(), networks, tmp_path / "c")
    assert set(rows) == {16}


@pytest.mark.parametrize("solver", ["unipc", "ddim", "heun", "ddpm"])
def test_other_solvers_draw_the_same_in_any_batch(solver, tmp_path):
    networks = generator_at(tmp_path, law=DDPM(prediction="epsilon"))
    config = config_of(solver=solver, num_samples=9, num_steps=4)
    requests = plan_samples(config, SEVEN, {})
    images = draw(requests, config, networks, tmp_path / "a")
    again = draw(requests[::-1], config.model_copy(update={"batch_size": 2}), networks, tmp_path / "b")
    assert np.array_equal(again[::-1], images)


def test_an_interrupted_drawing_goes_on_where_it_was_and_gives_the_same(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    whole = draw(requests, config_of(), networks, tmp_path / "whole")

    def stop(done, total):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(requests, config_of(), networks, tmp_path / "cut", stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    assert len(kept) == 2
    told = []
    resumed = draw(requests, config_of(), networks, tmp_path / "cut", lambda *progress: told.append(progress))
    assert np.array_equal(resumed, whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
    assert told == [(8, 21), (16, 21), (21, 21)]


def test_batches_of_another_request_or_generator_are_never_taken(networks, tmp_path):
    requests = plan_samples(config_of(), SEVEN, {})
    first = draw(requests, config_of(), networks, tmp_path / "work")
    others = generator_at(tmp_path / "others", seed=12)
    for changes, now in (({"guidance": 3.0}, networks), ({"num_steps": 5}, networks), ({}, others)):
        again = draw(requests, config_of(**changes), now, tmp_path / "work")
        assert not np.array_equal(again, first)
        assert np.array_equal(again, draw(requests, config_of(**changes), now, tmp_path / f"{changes}"))


def _draw_in_child(requests, config, networks, work):
    torch.set_num_threads(1)
    draw_samples(requests, config, **networks, work=work)


def child(*arguments):
    process = multiprocessing.get_context("spawn").Process(target=_draw_in_child, args=arguments)
    process.start()
    return process


def wait_for(work, num_batches, process):
    deadline = time.monotonic() + 60
    while len(list(work.glob("samples-*.npy"))) < num_batches:
        assert time.monotonic() < deadline
        assert process.is_alive() or process.exitcode == 0
        time.sleep(0.002)


def killed_twice(requests, config, networks, work, after=(2, 5)):
    """Draw in processes that are killed with no warning, then to the end here."""
    work.mkdir()
    num_kills = 0
    for num_batches in after:
        process = child(requests, config, networks, work)
        wait_for(work, num_batches, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_kills += process.exitcode == -signal.SIGKILL
    num_kept = len(list(work.glob("samples-*.npy")))
    return draw_samples(requests, config, **networks, work=work), num_kills, num_kept


def test_killed_twice_and_resumed_the_set_is_the_same(networks, tmp_path):
    config = config_of(num_samples=150, num_steps=40, batch_size=4)
    requests = plan_samples(config, SEVEN, {})
    images, num_kills, num_kept = killed_twice(requests, config, networks, tmp_path / "killed")
    assert num_kills == 2
    assert 5 <= num_kept < 38
    assert np.array_equal(images, draw(requests, config, networks, tmp_path / "whole"))


@pytest.mark.slow
def test_five_thousand_samples_killed_twice_and_resumed_are_the_same_set(networks, tmp_path):
    config = config_of(num_samples=5000, num_steps=2, batch_size=50)
    requests = plan_samples(config, SEVEN, {})
    images, num_kills, num_kept = killed_twice(requests, config, networks, tmp_path / "killed", after=(20, 60))
    assert (num_kills, num_kept < 100) == (2, True)
    assert np.array_equal(images, draw(requests, config, networks, tmp_path / "whole"))


def test_two_processes_share_the_work_and_none_is_done_twice(networks, tmp_path):
    config = config_of(num_samples=96, num_steps=40, batch_size=4)
    requests = plan_samples(config, SEVEN, {})
    work = tmp_path / "shared"
    work.mkdir()
    process = child(requests, config, networks, work)
    wait_for(work, 1, process)
    drawn = []

    class Counted(drawing.Drawer):
        def draw(self, batch):
            drawn.append(batch[0].number)
            return super().draw(batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawing, "Drawer", Counted)
        images = draw_samples(requests, config, **networks, work=work)
    times = {path: path.stat().st_mtime_ns for path in work.glob("samples-*.npy")}
    process.join(60)
    assert process.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in work.glob("samples-*.npy")} == times
    assert len(times) == 24
    assert 0 < len(drawn) < 24
    assert not list(work.glob(".*"))
    assert np.array_equal(images, draw(requests, config, networks, tmp_path / "alone"))


def test_what_a_generator_is_not_told_is_refused_before_any_work(tmp_path, monkeypatch):
    networks = generator_at(tmp_path, conditions=("diagnosis",))
    monkeypatch.setattr(drawing, "load_network", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"\['diagnosis', 'skin_type'\].*told \['diagnosis'\] only"):
        draw(plan_samples(config_of(), SEVEN, {}), config_of(), networks, tmp_path / "work")
    with pytest.raises(ValueError, match="diagnosis 'psoriasis' is not one of akiec, bcc"):
        draw(requests_of_cells([Diagnosis.PSORIASIS], [None], 1, 0), config_of(), networks, tmp_path / "work")
    requests = requests_of_cells([Diagnosis.NV], [None], 1, 0, further={"sex": "female"})
    with pytest.raises(ValueError, match="'sex'"):
        draw(requests, config_of(), networks, tmp_path / "work")
    monkeypatch.undo()
    config = config_of(skin_types=())
    assert len(draw(plan_samples(config, SEVEN, {}), config, networks, tmp_path / "work")) == 21


@pytest.mark.slow
def test_compiled_networks_draw_nearly_the_same_and_the_same_in_any_batch(networks, tmp_path):
    config = config_of(compile=True, precision="fp32", num_samples=10)
    requests = requests_of_cells(SEVEN[:5], [SkinType.II], 2, 0)
    images = draw(requests, config, networks, tmp_path / "a")
    again = draw(requests[::-1], config.model_copy(update={"batch_size": 3}), networks, tmp_path / "b")
    assert np.array_equal(again[::-1], images)
    plain = draw(requests, config.model_copy(update={"compile": False}), networks, tmp_path / "c")
    assert np.abs(plain.astype(int) - images).max() <= 1


@pytest.mark.parametrize(("num", "filled"), [(1, 1), (5, 8), (8, 8), (21, 32)])
def test_a_batch_larger_than_all_that_is_asked_for_is_not_filled_up(num, filled, networks, tmp_path, monkeypatch):
    sizes = []

    def draw_batch(self, batch):
        sizes.append((len(batch), self._config.batch_size))
        return np.zeros((len(batch), 4, 4, 3), np.uint8)

    monkeypatch.setattr(drawing.Drawer, "draw", draw_batch)
    config = config_of(num_samples=num, batch_size=10**6)
    draw(plan_samples(config, SEVEN, {}), config, networks, tmp_path / "work")
    assert sizes == [(num, filled)]
