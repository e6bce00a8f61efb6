"""Archives are unpacked whole or not at all, and never outside their folder."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.sources.fetch import archives
from derm_pipeline.sources.fetch.archives import in_words, lock_file, require_space, unpack_archives


def content(size: int = 3000) -> bytes:
    return np.random.default_rng().bytes(size)


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> dict[str, bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, body in members.items():
            packed.writestr(name, body)
    return members


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_unpacked_into_a_folder_of_its_name_and_stays(tmp_path, method):
    members = write_zip(tmp_path / "part_1.zip", {f"ISIC_{n:07d}.jpg": content() for n in range(150)}, method)
    assert unpack_archives(tmp_path, ["part_1"]) == ["part_1"]
    assert files(tmp_path / "part_1") == members
    assert (tmp_path / "part_1.zip").is_file()
    assert leftovers(tmp_path) == []


def test_what_is_unpacked_or_not_there_is_passed_over(tmp_path):
    write_zip(tmp_path / "a.zip", {"1.jpg": content()})
    write_zip(tmp_path / "b.zip", {"2.jpg": content()})
    (tmp_path / "a").mkdir()
    assert unpack_archives(tmp_path, ["a", "b", "c"]) == ["b"]
    assert files(tmp_path / "a") == {}
    assert unpack_archives(tmp_path, ["a", "b", "c"]) == []


def test_the_folder_that_everything_lies_in_is_not_nested(tmp_path):
    members = {"imgs_part_1/1.png": content(), "imgs_part_1/more/2.png": content()}
    write_zip(tmp_path / "images" / "imgs_part_1.zip", {"imgs_part_1/": b"", "imgs_part_1/empty/": b""} | members)
    assert unpack_archives(tmp_path, ["images/imgs_part_1"]) == ["images/imgs_part_1"]
    assert files(tmp_path / "images" / "imgs_part_1") == {
        name.removeprefix("imgs_part_1/"): body for name, body in members.items()
    }
    assert (tmp_path / "images" / "imgs_part_1" / "empty").is_dir()


@pytest.mark.parametrize("names", [["train/1.jpg", "train/2.jpg"], ["a/1.jpg", "2.jpg"], ["a", "b/1.jpg"]])
def test_any_other_folder_stays(tmp_path, names):
    members = write_zip(tmp_path / "a.zip", {name: content() for name in names})
    unpack_archives(tmp_path, ["a"])
    assert files(tmp_path / "a") == members


def test_extras_of_macos_are_left_out(tmp_path):
    body = content()
    write_zip(tmp_path / "a.zip", {"a/1.jpg": body, "__MACOSX/a/._1.jpg": content(), "__MACOSX/": b""})
    unpack_archives(tmp_path, ["a"])
    assert files(tmp_path / "a") == {"1.jpg": body}
    assert not (tmp_path / "a" / "__MACOSX").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil.jpg", "leaves the folder"),
        ("fine/../../evil.jpg", "leaves the folder"),
        ("/tmp/evil.jpg", "absolute"),
        ("C:/evil.jpg", "absolute"),
        ("..\\evil.jpg", "backslash"),
        ("bell\x07.jpg", "control character"),
        ("nul\0.jpg", "control character"),
        ("x" * 256, "too long"),
        ("d/" * 1200 + "x", "too long"),
    ],
)
def test_a_member_with_a_bad_path_is_refused_by_name_and_nothing_is_written(tmp_path, name, words):
    folder = tmp_path / "raw"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("good.jpg", content())
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        packed.writestr(info, content())
    with pytest.raises(ValueError, match=words) as error:
        unpack_archives(folder, ["a"])
    assert repr(name)[:50].strip("'") in str(error.value)
    assert "a.zip" in str(error.value)
    assert files(tmp_path).keys() == {"raw/a.zip"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        info = zipfile.ZipInfo("link.jpg")
        info.create_system = 3
        info.external_attr = (kind | 0o777) << 16
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="'link.jpg' is a link or a device"):
        unpack_archives(tmp_path, ["a"])
    assert files(tmp_path).keys() == {"a.zip"}


def patched(path: Path, local: int, central: int, form: str, value: int) -> None:
    """Write a field into the first member's local header and into its entry of the table of contents."""
    packed = bytearray(path.read_bytes())
    at = packed.index(b"PK\x01\x02")
    if local >= 0:
        struct.pack_into(form, packed, local, value)
    struct.pack_into(form, packed, at + central, value)
    path.write_bytes(packed)


def test_an_encrypted_member_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"secret.jpg": content()})
    patched(tmp_path / "a.zip", 6, 8, "<H", 1)
    with pytest.raises(ValueError, match="'secret.jpg' is encrypted"):
        unpack_archives(tmp_path, ["a"])


def test_a_method_that_cannot_be_read_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"odd.jpg": content()})
    patched(tmp_path / "a.zip", 8, 10, "<H", 9)
    with pytest.raises(ValueError, match=r"'odd.jpg' .* not supported \(9\)"):
        unpack_archives(tmp_path, ["a"])


def test_a_member_larger_than_any_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 2999)
    write_zip(tmp_path / "a.zip", {"large.jpg": content(3000)})
    with pytest.raises(ValueError, match=r"'large.jpg' has 3,000 bytes; at most 2,999"):
        unpack_archives(tmp_path, ["a"])


def test_a_decompression_bomb_is_refused_and_small_even_members_are_not(tmp_path):
    write_zip(tmp_path / "fine.zip", {"black.png": bytes(9_000_000)}, zipfile.ZIP_DEFLATED)
    assert unpack_archives(tmp_path, ["fine"]) == ["fine"]
    write_zip(tmp_path / "bomb.zip", {"black.png": bytes(11_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="'black.png' grows from .* to 11,000,000 bytes, like a decompression bomb"):
        unpack_archives(tmp_path, ["bomb"])


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A bomb without a high ratio (Fifield 2019): many entries point at the same bytes."""
    write_zip(tmp_path / "a.zip", {"1.jpg": content(5000)})
    packed = (tmp_path / "a.zip").read_bytes()
    start = packed.index(b"PK\x01\x02")
    end = packed.index(b"PK\x05\x06")
    entries = b"".join(packed[start:end].replace(b"1.jpg", b"%d.jpg" % n) for n in range(9))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, len(entries), start, 0)
    (tmp_path / "a.zip").write_bytes(packed[:start] + entries + tail)
    with pytest.raises(ValueError, match="overlapping"):
        unpack_archives(tmp_path, ["a"])


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 4)
    write_zip(tmp_path / "a.zip", {f"{n}.jpg": b"x" for n in range(5)})
    with pytest.raises(ValueError, match="5 members; at most 4"):
        unpack_archives(tmp_path, ["a"])


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("1.jpg", content())
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("1.jpg", content())
    with pytest.raises(ValueError, match=r"'1.jpg' is there twice"):
        unpack_archives(tmp_path, ["a"])
    write_zip(tmp_path / "b.zip", {"x": content(), "x/1.jpg": content()})
    with pytest.raises(ValueError, match="'x' is both a file and a folder"):
        unpack_archives(tmp_path, ["b"])


def test_an_archive_without_files_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"a/": b""})
    with pytest.raises(ValueError, match="holds no file"):
        unpack_archives(tmp_path, ["a"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_says_to_download_it_again(tmp_path, share):
    write_zip(tmp_path / "a.zip", {f"{n}.jpg": content() for n in range(20)})
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"a\.zip is not a whole zip archive .* download it again"):
        unpack_archives(tmp_path, ["a"])
    assert files(tmp_path).keys() == {"a.zip"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_with_wrong_bytes_is_named_and_nothing_is_left(tmp_path, method):
    members = {f"{n}.jpg": content() for n in range(20)}
    write_zip(tmp_path / "a.zip", members, method)
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        at = packed.getinfo("7.jpg").header_offset + 30 + len("7.jpg") + 1500
    damaged = bytearray((tmp_path / "a.zip").read_bytes())
    damaged[at] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.zip is damaged at its member '7.jpg' .* download it again"):
        unpack_archives(tmp_path, ["a"])
    assert files(tmp_path).keys() == {"a.zip"}
    write_zip(tmp_path / "a.zip", members, method)
    assert unpack_archives(tmp_path, ["a"]) == ["a"]


def test_random_damage_gives_the_right_bytes_or_a_value_error(tmp_path):
    rng = np.random.default_rng()
    members = {f"{n}.jpg": content(200) for n in range(10)}
    write_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    whole = (tmp_path / "a.zip").read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        (tmp_path / "a.zip").write_bytes(damaged)
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        try:
            unpack_archives(tmp_path, ["a"])
        except ValueError:
            assert not (tmp_path / "a").exists()
        else:  # only a name, or what no reader looks at, was changed
            assert set(files(tmp_path / "a").values()) <= set(members.values()) | {b""}
    assert all(
        path.parent in (tmp_path, tmp_path / "a") or tmp_path / "a" in path.parents for path in tmp_path.rglob("*")
    )


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", {f"{n}.jpg": content(5000) for n in range(1000)})
    free = archives.SPARE_BYTES + 1000 * 8192
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free - 1))
    with pytest.raises(ValueError, match=r"unpacking a\.zip needs 108\.2 MB and the disk of .* has 108\.2 MB free"):
        unpack_archives(tmp_path, ["a"])
    assert files(tmp_path).keys() == {"a.zip"}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    assert unpack_archives(tmp_path, ["a"]) == ["a"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_said_with_what_to_do(tmp_path, monkeypatch, number):
    write_zip(tmp_path / "a.zip", {"1.jpg": content()})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"unpack a\.zip yourself into a/") as error:
        unpack_archives(tmp_path, ["a"])
    assert error.value.errno == number
    assert error.value.filename == str(tmp_path)
    assert leftovers(tmp_path) == []


def test_progress_counts_bytes_of_archives_over_all_of_them(tmp_path):
    for name in ("a", "b"):
        write_zip(tmp_path / f"{name}.zip", {f"{n}.jpg": content() for n in range(200)})
    total = sum((tmp_path / f"{name}.zip").stat().st_size for name in ("a", "b"))
    seen: list[tuple[int, int]] = []
    unpack_archives(tmp_path, ["a", "b"], lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}
    assert len(seen) > 6


def test_a_killed_unpacking_starts_again(tmp_path):
    members = write_zip(tmp_path / "a.zip", {f"{n}.jpg": content(50) for n in range(5000)})
    script = (
        "import sys; from pathlib import Path; from derm_pipeline.sources.fetch.archives import unpack_archives; "
        "unpack_archives(Path(sys.argv[1]), ['a'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while process.poll() is None and not (tmp_path / ".a.unpacking" / "3.jpg").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert (tmp_path / ".a.unpacking").is_dir()
    assert not (tmp_path / "a").exists()
    assert unpack_archives(tmp_path, ["a"]) == ["a"]
    assert files(tmp_path / "a") == members
    assert leftovers(tmp_path) == []


def _unpack_and_tell(folder: Path, results: multiprocessing.Queue) -> None:
    results.put(unpack_archives(folder, ["a"]))


def test_of_several_processes_one_unpacks_and_the_others_find_it_done(tmp_path):
    members = write_zip(tmp_path / "a.zip", {f"{n}.jpg": content(50) for n in range(2000)})
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_unpack_and_tell, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    told = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(told) == [[], [], [], ["a"]]
    assert files(tmp_path / "a") == members
    assert leftovers(tmp_path) == []


def _count_up(path: Path, lock: Path) -> None:
    for _ in range(100):
        with lock_file(lock):
            path.write_text(str(int(path.read_text()) + 1))


def test_the_lock_lets_one_in_at_a_time_and_leaves_no_file(tmp_path):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_up, args=(tmp_path / "count", tmp_path / ".lock")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "400"
    assert not (tmp_path / ".lock").exists()


def test_sizes_are_said_in_words(tmp_path):
    told = [in_words(size) for size in (0, 999, 1000, 1_234_567, 999_960, 2_800_000_000, 5 * 10**12)]
    assert told == ["0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "1.0 MB", "2.8 GB", "5.0 TB"]
    require_space(tmp_path, 1, "nothing much")


def test_a_zip_inside_is_a_file_like_any_other(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as packed:
        packed.writestr("deep.jpg", content())
    members = write_zip(tmp_path / "a.zip", {"inner.zip": inner.getvalue()})
    unpack_archives(tmp_path, ["a"])
    assert files(tmp_path / "a") == members
