"""The store: memoised, atomic, resumable, verifiable."""

import json
import multiprocessing
import os
import random
import shutil
import signal

import pyarrow as pa
import pytest

from derm_pipeline.store import Build, Request, Store, StoreError, digest_of_json


def request(asset="records", partition="phantom", inputs=None, settings=None, code_version="1"):
    references = {role: artifact.reference for role, artifact in (inputs or {}).items()}
    return Request(asset, partition, references, settings or {}, code_version)


def writes(text):
    def make(build: Build):
        build.write_bytes("data.txt", text.encode())
        build.counts["num_bytes"] = len(text)

    return make


def fails(build: Build):
    raise AssertionError("must not be made again")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_the_same_request_is_made_once(store):
    first = store.obtain(request(settings={"a": 1}), writes("hello"))
    again = store.obtain(request(settings={"a": 1}), fails)
    assert again.manifest == first.manifest
    assert again.path("data.txt").read_text() == "hello"
    assert again.counts == {"num_bytes": 5}


def test_settings_code_version_and_input_content_change_the_key(store):
    one, two = (store.obtain(request(settings={"n": n}), writes(str(n))) for n in (1, 2))
    same_content = store.obtain(request(settings={"n": 3}), writes("1"))
    keys = {
        request("hair", inputs={"records": one}).key,
        request("hair", inputs={"records": two}).key,
        request("hair", inputs={"records": one}, code_version="2").key,
        request("hair", inputs={"records": one}, settings={"x": 1}).key,
    }
    assert len(keys) == 4
    # an upstream rebuilt to the same content stops the wave
    assert request("hair", inputs={"records": same_content}).key == request("hair", inputs={"records": one}).key


def test_an_interrupted_build_is_not_finished_and_is_resumed(store):
    def interrupted(build: Build):
        (build.work / "half").write_text("half")
        build.write_bytes("data.txt", b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(request(), interrupted)
    assert store.find(request()) is None
    assert not store.has("records", "phantom")
    with pytest.raises(StoreError, match="materialise it first"):
        store.current("records", "phantom")

    def resumed(build: Build):
        assert (build.work / "half").read_text() == "half"
        build.write_bytes("data.txt", b"x")

    artifact = store.obtain(request(), resumed)
    assert sorted(artifact.manifest.files) == ["data.txt"]
    assert store.unfinished() == []


def _killed_while_building(root, started):
    def make(build: Build):
        (build.work / "half").write_text("half")
        started.set()
        signal.pause()

    Store(root).obtain(request(), make)


def test_a_killed_builder_leaves_no_lock_behind(store):
    started = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=_killed_while_building, args=(store.root, started))
    process.start()
    assert started.wait(10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(store.unfinished()) == 1
    assert store.obtain(request(), writes("x")).counts == {"num_bytes": 1}


def test_content_digest_depends_on_content_only(store):
    first = store.obtain(request(settings={"n": 1}), writes("same"))
    second = store.obtain(request(settings={"n": 2}), writes("same"))
    third = store.obtain(request(settings={"n": 3}), writes("other"))
    assert first.manifest.content_digest == second.manifest.content_digest != third.manifest.content_digest


def test_tables_are_written_to_the_same_bytes(store):
    rows = [{"x": random.random(), "y": str(i)} for i in range(100)]
    digests = {
        store.obtain(
            request(settings={"n": n}), lambda build: build.write_table("t.parquet", pa.Table.from_pylist(rows))
        ).manifest.content_digest
        for n in range(2)
    }
    assert len(digests) == 1


def test_only_rows_made_with_the_same_settings_and_code_may_be_reused(store):
    upstream = [store.obtain(request("raw", settings={"n": n}), writes(str(n))) for n in range(2)]
    seen = []

    def make(build: Build):
        seen.append(build.previous.manifest.key if build.previous else None)
        writes("rows")(build)

    first = store.obtain(request("hair", inputs={"raw": upstream[0]}), make)
    store.obtain(request("hair", inputs={"raw": upstream[1]}), make)
    store.obtain(request("hair", inputs={"raw": upstream[1]}, settings={"threshold": 2}), make)
    store.obtain(request("hair", inputs={"raw": upstream[0]}, settings={"threshold": 2}, code_version="2"), make)
    assert seen == [None, first.manifest.key, None, None]


def test_verify_names_every_kind_of_damage(store):
    artifact = store.obtain(request(), writes("hello"))
    assert store.verify() == []
    artifact.path("data.txt").write_text("hullo")
    assert [problem.what for problem in store.verify()] == ["data.txt was changed after the artifact was finished"]
    artifact.path("data.txt").unlink()
    (artifact.directory / "extra").write_text("")
    assert [problem.what for problem in store.verify()] == ["data.txt is missing", "extra is not in the manifest"]
    with pytest.raises(StoreError, match="damaged"):
        store.find(request())


def test_verify_notices_an_edited_manifest(store):
    path = store.obtain(request(settings={"n": 1}), writes("hello")).directory / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"settings": {"n": 2}}))
    assert [problem.what for problem in store.verify()] == ["manifest.json was changed after the artifact was finished"]
    path.write_text("{}")
    assert "not a manifest" in store.verify()[0].what


def test_prune_keeps_what_a_kept_artifact_was_made_from(store):
    old_raw = store.obtain(request("raw", settings={"n": 1}), writes("1"))
    hair = store.obtain(request("hair", inputs={"raw": old_raw}), writes("hair"))
    new_raw = store.obtain(request("raw", settings={"n": 2}), writes("2"))
    unused = store.obtain(request("captions", settings={"n": 1}), writes("a"))
    store.obtain(request("captions", settings={"n": 2}), writes("b"))
    assert store.prune(dry_run=True) == [unused.directory]
    assert unused.directory.exists()
    store.prune()
    assert {artifact.directory for artifact in store.artifacts()} >= {
        old_raw.directory,
        new_raw.directory,
        hair.directory,
    }
    assert not unused.directory.exists()
    assert store.prune() == []
    assert store.verify() == []


def test_lineage_walks_to_the_first_artifact(store):
    raw = store.obtain(request("raw"), writes("1"))
    hair = store.obtain(request("hair", inputs={"raw": raw}), writes("2"))
    report = store.obtain(request("report", inputs={"hair": hair, "raw": raw}), writes("3"))
    node = store.lineage(report)
    assert node.inputs["hair"].inputs["raw"].reference == raw.reference == node.inputs["raw"].reference


def test_artifacts_are_found_by_name_and_by_key(store):
    raw = store.obtain(request("raw"), writes("1"))
    for name in ("raw", "raw/phantom", str(raw.reference), raw.manifest.key[:8]):
        assert store.resolve(name).reference == raw.reference
    for name in ("nothing", "raw/none", "raw/phantom/0000"):
        with pytest.raises(StoreError):
            store.resolve(name)


def test_two_processes_with_the_same_request_build_once(store):
    made = store.root.parent / "made"

    def work():
        def make(build: Build):
            with made.open("a") as handle:
                handle.write("x")
            writes("x")(build)

        store.obtain(request(), make)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert made.read_text() == "x"


def test_json_digest_ignores_key_order():
    assert digest_of_json({"a": 1, "b": [1, 2]}) == digest_of_json({"b": [1, 2], "a": 1})


def test_what_was_removed_by_hand_is_made_again(store):
    raw = store.obtain(request("raw"), writes("1"))
    hair = store.obtain(request("hair", inputs={"raw": raw}), writes("2"))
    shutil.rmtree(hair.directory)
    assert not store.has("hair", "phantom")
    assert store.partitions("hair") == []
    assert store.prune(dry_run=True) == []
    with pytest.raises(StoreError, match="materialise it first"):
        store.current("hair", "phantom")
    again = store.obtain(request("hair", inputs={"raw": raw}), writes("2"))
    assert again.reference == hair.reference
    assert store.current("hair", "phantom").reference == hair.reference


def test_rows_of_a_damaged_artifact_are_not_reused(store):
    first = store.obtain(request("hair", inputs={"raw": store.obtain(request("raw"), writes("1"))}), writes("rows"))
    first.path("data.txt").write_text("ro")
    other = store.obtain(request("raw", settings={"n": 2}), writes("2"))
    seen = []

    def make(build: Build):
        seen.append(build.previous)
        writes("rows")(build)

    store.obtain(request("hair", inputs={"raw": other}), make)
    assert seen == [None]


def test_prune_finishes_a_prune_that_was_killed_and_spares_what_is_being_built(store):
    store.obtain(request("raw"), writes("1"))
    left = store.root / "raw" / "phantom" / ".abc.removed"
    left.mkdir()
    (left / "manifest.json").write_text("{}")

    def building(build: Build):
        assert store.prune() == [left]
        writes("2")(build)

    store.obtain(request("hair"), building)
    assert not left.exists()
    assert store.prune() == []
