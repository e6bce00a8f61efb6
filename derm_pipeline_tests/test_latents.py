"""Moments: stored once, in every orientation, resumable, reused by digest, filled in by several processes."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from derm_pipeline import images, latents
from derm_pipeline.latents import ImageFile, LatentConfig
from derm_pipeline.latents import moments as moments_module


def encode(batch):
    """A stand-in with the shape of an encoder: block means, and a constant log-variance."""
    mean = torch.nn.functional.avg_pool2d(batch, 4)
    return mean, torch.full_like(mean, -2.0)


@pytest.fixture
def files(tmp_path):
    made = []
    for number in range(10):
        content = images.encode_png(np.random.default_rng(number).integers(0, 256, (20, 24, 3)).astype(np.uint8))
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        made.append(ImageFile(path, hashlib.sha256(content).hexdigest()))
    return made


CONFIG = LatentConfig(size_px=16, orientations=8, shard_size=4, batch_size=3)


def read(files):
    return latents.read_squares(files, size_px=16)


def test_moments_of_every_orientation_are_those_of_the_oriented_image(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "out")
    digests, moments = latents.load_moments(tmp_path / "out")
    assert digests == [file.sha256 for file in files]
    assert moments.shape == (10, 8, 6, 4, 4)
    batch = latents.to_model_range(torch.from_numpy(read(files)))
    for orientation in range(8):
        mean, logvar = encode(latents.orient(batch, orientation))
        expected = torch.cat([mean, logvar], 1).half()
        assert torch.equal(moments[:, orientation], expected)


def test_the_eight_orientations_differ_and_the_second_is_the_mirror_image():
    batch = torch.randn(2, 3, 5, 5)
    turned = [latents.orient(batch, k) for k in range(8)]
    assert all(not torch.equal(a, b) for i, a in enumerate(turned) for b in turned[:i])
    assert torch.equal(turned[1], batch.flip(3))


def test_the_geometry_is_the_one_named(tmp_path):
    ramp = np.broadcast_to((np.arange(600) % 256).astype(np.uint8)[None, :, None], (450, 600, 3))
    path = tmp_path / "ramp.png"
    Image.fromarray(np.ascontiguousarray(ramp)).save(path)
    file = ImageFile(path, hashlib.sha256(path.read_bytes()).hexdigest())
    made = {name: latents.read_squares([file], size_px=256, geometry=name)[0] for name in ("crop", "squash", "pad")}
    assert made["crop"].mean() == pytest.approx(139.09765625)  # parity.md: ADM's crop of 600 x 450, x mod 256
    assert made["crop"][0, :4, 0].tolist() == [74, 76, 78, 80]
    assert made["squash"][0, 0, 0] < 5  # nothing is cut off
    assert made["pad"][:31].max() == 0
    assert made["pad"][-31:].max() == 0


def test_a_large_jpeg_is_decoded_at_reduced_scale(tmp_path, monkeypatch):
    decoded = []
    whole = latents.pixels.decode
    monkeypatch.setattr(
        latents.pixels, "decode", lambda *args, **kwargs: decoded.append(whole(*args, **kwargs)) or decoded[-1]
    )
    smooth = np.kron(np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8), np.ones((64, 64, 1)))
    content = images.encode_jpeg(smooth.astype(np.uint8))
    (tmp_path / "a.jpg").write_bytes(content)
    latents.read_squares([ImageFile(tmp_path / "a.jpg", hashlib.sha256(content).hexdigest())], size_px=48)
    assert decoded[0].shape == (48, 64, 3)


@pytest.mark.parametrize(("size_px", "num", "expected"), [(64, 70, 24), (256, 33, 17), (512, 20, 7), (2048, 2, 1)])
def test_a_cpu_encodes_parts_of_a_batch_that_fit_its_caches(files, tmp_path, size_px, num, expected):
    seen = []

    def noted(batch):
        seen.append(len(batch))
        return batch[:, :1, :4, :4], batch[:, :1, :4, :4]

    def drawn(some):
        squares = np.zeros((len(some), size_px, size_px, 3), np.uint8)
        squares[:, 0, 0, 0] = np.arange(len(some))
        return squares

    many = [ImageFile(files[0].path, f"{number:064x}") for number in range(num)]
    latents.encode_images(many, drawn, noted, LatentConfig(size_px=size_px), out=tmp_path / "out")
    assert max(seen) == expected
    assert max(seen) - min(seen) <= 1
    moments = latents.load_moments(tmp_path / "out")[1]
    assert torch.equal(moments[:, 0, 0, 0, 0], (torch.arange(num) / 127.5 - 1).half())


def test_an_interrupted_encoding_keeps_its_finished_shards(files, tmp_path):
    seen = []

    def interrupted(some):
        seen.append(len(some))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(some)

    with pytest.raises(KeyboardInterrupt):
        latents.encode_images(files, interrupted, encode, CONFIG, out=tmp_path / "out")
    again = []
    latents.encode_images(
        files, lambda some: again.append(len(some)) or read(some), encode, CONFIG, out=tmp_path / "out"
    )
    assert sum(again) == 6  # the first shard of four was kept
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "whole")
    assert torch.equal(latents.load_moments(tmp_path / "out")[1], latents.load_moments(tmp_path / "whole")[1])


def encode_until_killed(files, out, started):
    """In a process of its own: the first shard is made; within the second it hangs."""
    seen = []

    def hanging(some):
        seen.extend(some)
        if len(seen) > CONFIG.shard_size:
            while not (out / "moments-00000.safetensors").exists():
                time.sleep(0.01)
            started.set()
            time.sleep(600)
        return read(some)

    latents.encode_images(files, hanging, encode, CONFIG, out=out)


def test_what_a_killed_process_leaves_is_taken_over_at_once(files, tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    other = context.Process(target=encode_until_killed, args=(files, tmp_path / "out", started), daemon=True)
    other.start()
    assert started.wait(60)
    seen, killed = [], threading.Event()

    def noted(some):
        assert killed.is_set()  # until then it holds the second shard, and the third in advance
        seen.extend(some)
        return read(some)

    def kill():
        killed.set()
        os.kill(other.pid, signal.SIGKILL)

    threading.Timer(0.3, kill).start()
    latents.encode_images(files, noted, encode, CONFIG, out=tmp_path / "out")
    assert [file.path.name for file in seen] == [f"{number}.png" for number in range(4, 10)]
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "out").glob("*.lock"))


ONE_A_SHARD = LatentConfig(size_px=16, shard_size=1)


def encode_beside_another(files, out, both, seen):
    met = []

    def noted(some):
        for file in some:
            seen.put(file.path.name)
        if not met:
            met.append(both.wait(60))  # neither goes on before the other holds a shard too
        time.sleep(0.01)
        return read(some)

    latents.encode_images(files, noted, encode, ONE_A_SHARD, out=out)


def test_two_processes_fill_one_folder_and_no_image_is_encoded_twice(files, tmp_path):
    context = multiprocessing.get_context("spawn")
    both, seen = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=encode_beside_another, args=(files, tmp_path / "out", both, seen), daemon=True)
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    names = sorted(seen.get(timeout=60) for _ in files)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert names == sorted(file.path.name for file in files)
    assert seen.empty()
    latents.encode_images(files, read, encode, ONE_A_SHARD, out=tmp_path / "alone")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_shards_of_other_images_or_of_another_geometry_are_not_taken(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path)
    for others, config in ((files[::-1], CONFIG), (files, CONFIG.model_copy(update={"geometry": "pad"}))):
        with pytest.raises(ValueError, match="moments-00000.*other images"):
            latents.encode_images(others, read, encode, config, out=tmp_path)


def test_the_next_batches_are_decoded_while_one_is_encoded_and_never_more_than_a_few(files, tmp_path):
    encoding, ahead = threading.Event(), threading.Semaphore(0)
    num_read, lead = 0, []

    def counted(some):
        nonlocal num_read
        num_read += 1
        ahead.release()
        return read(some)

    def slow(batch):
        if not encoding.is_set():
            encoding.set()
            for _ in range(3):  # this batch and two more are read although none is encoded yet
                assert ahead.acquire(timeout=10)
            time.sleep(0.05)
        lead.append(num_read)
        return encode(batch)

    config = LatentConfig(size_px=16, batch_size=1)
    latents.encode_images(files, counted, slow, config, out=tmp_path)
    assert lead[0] == 3
    assert num_read == len(files)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0, -70_000.0])
def test_moments_that_half_precision_cannot_hold_are_refused_by_name(files, tmp_path, value):
    def overflowing(batch):
        mean, logvar = encode(batch)
        if len(batch) == 2:  # the last of three shards
            mean[1, 2, 3, 3] = value
        return mean, logvar

    with pytest.raises(ValueError, match=r"9\.png.*float16"):
        latents.encode_images(files, read, overflowing, CONFIG, out=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("moments-*")) == [
        f"moments-{number:05d}.safetensors" for number in range(2)
    ]


def test_rows_of_an_earlier_folder_are_reused_by_digest(files, tmp_path):
    latents.encode_images(files[:7], read, encode, CONFIG, out=tmp_path / "old")
    encoded = []
    num_reused = latents.encode_images(
        files[::-1],
        lambda some: encoded.extend(some) or read(some),
        encode,
        CONFIG,
        out=tmp_path / "new",
        previous=tmp_path / "old",
    )
    assert num_reused == 7
    assert {file.path for file in encoded} == {file.path for file in files[7:]}
    latents.encode_images(files[::-1], read, encode, CONFIG, out=tmp_path / "fresh")
    assert torch.equal(latents.load_moments(tmp_path / "new")[1], latents.load_moments(tmp_path / "fresh")[1])


def test_statistics_are_those_of_sampled_latents(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "out")
    moments = latents.load_moments(tmp_path / "out")[1].float()
    statistics = latents.latent_statistics(moments)
    mean, logvar = moments.repeat(60, 1, 1, 1, 1).chunk(2, 2)
    drawn = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    assert statistics["mean"] == pytest.approx(drawn.mean((0, 1, 3, 4)).tolist(), abs=0.01)
    assert statistics["std"] == pytest.approx(drawn.std((0, 1, 3, 4)).tolist(), rel=0.01)


def test_an_earlier_folder_of_other_orientations_cannot_be_reused(files, tmp_path):
    latents.encode_images(files, read, encode, ONE_A_SHARD, out=tmp_path / "old")
    with pytest.raises(ValueError, match="holds 2 orientations, not 8"):
        latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "new", previous=tmp_path / "old")


def test_statistics_chunk_by_chunk_are_those_of_all_at_once(monkeypatch):
    moments = torch.randn(37, 2, 6, 5, 5).mul(3).add(torch.arange(6).view(6, 1, 1)).half()
    whole = latents.latent_statistics(moments)
    mean, logvar = moments.double().chunk(2, 2)
    axes = (0, 1, 3, 4)
    assert whole["mean"] == mean.mean(axes).tolist()
    assert whole["std"] == (mean.var(axes, unbiased=False) + logvar.exp().mean(axes)).sqrt().tolist()
    monkeypatch.setattr(moments_module, "_CHUNK_BYTES", 5 * 2 * 2 * 6 * 25)
    for name, values in latents.latent_statistics(moments).items():
        assert values == pytest.approx(whole[name], rel=1e-12)


@pytest.fixture
def folder(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "out")
    return tmp_path / "out"


def test_mapped_moments_are_indexed_as_the_tensor_is(folder):
    digests, tensor = latents.load_moments(folder)
    same, moments = latents.open_moments(folder)
    assert same == digests
    assert moments.shape == tensor.shape
    assert len(moments) == len(tensor)
    rows, orientations = torch.randint(10, (23,)), torch.randint(8, (23,))
    assert torch.equal(moments[rows, orientations], tensor[rows, orientations])
    assert torch.equal(moments.gather(rows.tolist(), orientations.tolist()), tensor[rows, orientations])
    assert torch.equal(moments[rows], tensor[rows])
    assert torch.equal(torch.cat(list(moments.chunks(1))), tensor)
    assert torch.equal(moments.to("cpu")[rows, orientations], tensor[rows, orientations])
    assert latents.latent_statistics(moments) == latents.latent_statistics(tensor)
    assert moments[rows, orientations].dtype == torch.float16
    assert moments[rows[:0], orientations[:0]].shape == (0, 6, 4, 4)


def test_only_the_rows_asked_for_are_loaded_in_the_order_asked_for(folder):
    digests, tensor = latents.load_moments(folder)
    some, chosen = latents.load_moments(folder, rows=[9, 0, 5])
    assert some == [digests[9], digests[0], digests[5]]
    assert torch.equal(chosen, tensor[[9, 0, 5]])


@pytest.mark.parametrize(("rows", "orientations"), [([10], [0]), ([-1], [0]), ([0], [8]), ([0], [-1])])
def test_a_row_or_orientation_that_there_is_not_is_refused(folder, rows, orientations):
    with pytest.raises(IndexError, match="there are 0 to"):
        latents.open_moments(folder)[1].gather(rows, orientations)


def resident_bytes():
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")  # noqa: PTH110
def test_opening_moments_reads_none_of_them(folder):
    large = torch.zeros(4, 8, 6, 400, 400, dtype=torch.float16)  # 61 MB
    path = folder / "moments-00001.safetensors"
    save_file({"moments": large}, path)
    for other in ("moments-00000", "moments-00002"):
        save_file({"moments": large}, folder / f"{other}.safetensors")
    load_file(path)
    before = resident_bytes()
    moments = latents.open_moments(folder)[1]
    moments.gather([5], [3])
    assert resident_bytes() - before < 0.1 * moments.num_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: save_file({"moments": torch.zeros(2, 8, 6, 4, 4).half()}, path), "not the shard"),
        (lambda path: save_file({"others": torch.zeros(4, 8, 6, 4, 4).half()}, path), "damaged"),
    ],
)
def test_a_damaged_shard_is_named(folder, damage, message):
    damage(folder / "moments-00001.safetensors")
    with pytest.raises(ValueError, match=f"moments-00001.safetensors.*{message}"):
        latents.open_moments(folder)


def test_a_file_changed_behind_our_back_is_refused(files):
    files[3].path.write_bytes(files[4].path.read_bytes())
    with pytest.raises(ValueError, match=r"3\.png was changed"):
        read(files)


def test_pixels_survive_the_way_to_the_model_range_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    back = latents.to_pixels(latents.to_model_range(torch.from_numpy(pixels)))
    assert np.abs(back.astype(int) - pixels.astype(int)).max() <= 1


def test_artefacts_are_removed_where_asked(files):
    restored = latents.read_squares(files, size_px=16, restore=lambda image, digest: np.zeros_like(image))
    assert restored.max() == 0
