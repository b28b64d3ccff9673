"""Features made in parts: shards of a run and their merger, and Ray with workers that die."""

import functools
import json
import os
import shutil
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
from test_shards import picture, write_shard

from embed_slowly import BATCH_SIZE, Slow, small_model
from paddle_clip import bulk, cli, embed, embed_on_ray, extras, load_features, merge, samples

needs_ray = pytest.mark.skipif(not extras.has("ray"), reason="Ray is not installed: pip install 'ray[data]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-three images, two of them damaged, of which three shards have the same."""
    folder = tmp_path_factory.mktemp("bulk")
    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    contents = {f"{n:02}.png": picture(n)[: 200 if n in (3, 17) else None] for n in range(23)}
    for name, content in contents.items():
        (folder / "files" / name).write_bytes(content)
    names = list(contents)
    for shard, first in enumerate((0, 10, 15)):
        last = (10, 15, 23)[shard]
        write_shard(folder / "shards" / f"{shard}.tar", {name: contents[name] for name in names[first:last]})
    return folder


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(*arguments, batch_size=BATCH_SIZE, on_error="skip", progress=False, **options)


def content(path):
    return [file.read_bytes() for file in (path, path.with_suffix(".json"))]


# ----------------------------------------------------------------------------------------------------- shards, merging


@pytest.mark.parametrize("source", ["files", "shards"])
@pytest.mark.parametrize("shards", [1, 3, 7])
def test_merged_shards_are_the_file_of_one_process(folder, tmp_path, source, shards):
    model, preprocess = small_model()
    quietly(embed, model, preprocess, folder / source, tmp_path / "whole.npy")
    for shard in reversed(range(shards)):  # with seven, some have no images
        quietly(embed, model, preprocess, folder / source, tmp_path / "x.npy", shard=(shard, shards))
    parts = [tmp_path / f"x-{shard:05}-of-{shards:05}.npy" for shard in range(shards)]
    assert sorted(tmp_path.glob("x*.npy")) == parts
    found = merge(parts[::-1], tmp_path / "merged.npy")
    assert content(tmp_path / "merged.npy") == content(tmp_path / "whole.npy")
    assert len(found.paths) == 21 and len(found.damaged) == 2
    table = merge(parts, tmp_path / "merged.parquet")
    np.testing.assert_array_equal(table.features, found.features)
    assert table[1:] == found[1:]
    for part in parts[1:]:
        part.unlink()
    if shards > 1:
        with pytest.raises(ValueError, match=f"{shards - 1} of {shards} parts are missing: 1"):
            merge(parts[:1], tmp_path / "x.npy")


def test_a_shard_that_is_killed_goes_on(folder, tmp_path):
    """A shard has a journal of its own: what another shard left is not taken for it."""
    model, preprocess = small_model()
    with pytest.raises(ValueError, match=r"03\.png"):
        embed(model, preprocess, folder / "files", tmp_path / "x.npy", BATCH_SIZE, shard=(0, 2), progress=False)
    expected = quietly(embed, model, preprocess, folder / "files").features
    found = [
        quietly(embed, model, preprocess, folder / "files", tmp_path / "x.npy", shard=(n, 2)).features for n in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_what_cannot_be_merged(tmp_path):
    for name, width in (("a", 4), ("b", 5), ("a-00000-of-00002", 4), ("b-00001-of-00002", 4)):
        np.save(tmp_path / f"{name}.npy", np.ones([2, width], np.float32))
        (tmp_path / f"{name}.json").write_text(json.dumps({"paths": [f"{name}0", f"{name}1"], "damaged": []}))
    a, b, first, second = (tmp_path / f"{n}.npy" for n in ("a", "b", "a-00000-of-00002", "b-00001-of-00002"))
    assert merge([a, a], tmp_path / "c.npy").paths == ["a0", "a1"] * 2  # in the order given
    for parts, message in (
        ([a, b], "different models: .*a.npy has features of 4 numbers, .*b.npy has 5"),
        ([first, second], "the parts are of several outputs"),
        ([], "there are no parts"),
        ([tmp_path / "a.json"], "not a file of features"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(parts, tmp_path / "d.npy")
    with pytest.raises(ValueError, match="is one of the parts"):
        merge([a], a)
    assert not (tmp_path / "d.npy").exists()


@pytest.mark.parametrize("shard", [(-1, 3), (3, 3), (0, 0)])
def test_shards_that_there_are_not(shard):
    with pytest.raises(ValueError, match="counted from 0"):
        embed(*small_model(), samples(), shard=shard)


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["embed", "@samples", "--model", "tiny", "--engine", "eager", "--batch-size", "3"]
    assert cli.main([*common, "-o", "whole.npy"]) == 0
    for shard in ("0/2", "1/2"):
        assert cli.main([*common, "-o", "x.npy", "--shard", shard]) == 0
    assert "x-00001-of-00002.npy: 5 features of 64 numbers" in capsys.readouterr().out
    assert cli.main(["merge", *map(str, tmp_path.glob("x-*.npy")), "-o", "merged.npy"]) == 0
    assert content(tmp_path / "merged.npy") == content(tmp_path / "whole.npy")
    for wrong in ("2/2", "two", "1/2/3", "-1/2"):
        with pytest.raises(SystemExit):
            cli.main([*common, "-o", "x.npy", f"--shard={wrong}"])
    assert cli.main([*common, "-o", "out", "--ray", "--shard", "0/2"]) == 1
    assert "--shard" in capsys.readouterr().err


def test_the_message_without_ray(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "_is_installed", lambda package: package != "ray")
    with pytest.raises(ImportError, match=r"ray\[data\] is not installed: pip install 'ray\[data\]' pyarrow"):
        embed_on_ray(small_model, samples(), tmp_path)


# ----------------------------------------------------------------------------------------------------------------- Ray


def load_slowly(seconds, log, threads):
    """The model of these tests in an actor; its process notes each image it prepares in a file of its own."""
    model, preprocess = small_model()
    return model, Slow(Noted(preprocess, log), seconds)


class Noted:
    def __init__(self, preprocess, log):
        self.preprocess, self.log = preprocess, log

    def array(self, image):
        if hasattr(image, "name"):  # and not the probe
            with open(os.path.join(self.log, str(os.getpid())), "a") as file:
                file.write(os.path.basename(image.name) + "\n")
        return self.preprocess.array(image)


@pytest.fixture(scope="module")
def cluster():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for its workers, which import these tests
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


@pytest.fixture
def on_ray(cluster, tmp_path, monkeypatch):
    """A function embedding a source on the cluster, five images to a part, and the log of what was read."""
    monkeypatch.setattr(bulk, "FILES_IN_A_PART", 5)
    log = tmp_path / "log"
    log.mkdir()

    def call(source, seconds=0.0, **options):
        load = functools.partial(load_slowly, seconds, str(log))
        return quietly(embed_on_ray, load, source, tmp_path / "out", **{"actors": 1, **options})

    call.log, call.output = log, tmp_path / "out"
    return call


def same(output, expected, tmp_path):
    found = merge(output, tmp_path / "merged.npy")
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.paths == expected.paths
    assert found.damaged == expected.damaged
    assert not [path for path in output.iterdir() if not path.name.startswith("part-")]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("files", [f"files/{n:02}.png" for n in range(23)]),
        ("files/2*.png", [f"files/2{n}.png" for n in range(3)]),
        ("shards", [f"shards/{n}.tar" for n in range(3)]),
        ("shards/{1..2}.tar", ["shards/1.tar", "shards/2.tar"]),
        (["shards/2.tar", "shards/0.tar"], ["shards/2.tar", "shards/0.tar"]),
    ],
)
def test_sources(folder, monkeypatch, source, expected):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(folder)
    place, names = bulk._sources(source)
    assert names == expected
    assert place.path_of(names[0]) == str(folder / names[0])
    if isinstance(source, str) and "{" not in source:
        place, names = bulk._sources(f"file://{folder}/{source}")
        assert names == [f"file://{folder}/{name}" for name in expected]
        assert place.path_of(names[0]) == f"{folder}/{expected[0]}"
    for nothing in ("missing/", f"file://{folder}/files/*.tar"):
        with pytest.raises((FileNotFoundError, ValueError)):
            bulk._sources(nothing)


def test_parts_are_whole_batches(monkeypatch):
    """Or the last images of a part would be encoded with fewer others than in one process."""
    monkeypatch.setattr(bulk, "FILES_IN_A_PART", 10)
    names = [f"{n}.png" for n in range(20)]
    assert [len(part) for part in bulk._parts(names, 4)] == [8, 8, 4]
    assert [len(part) for part in bulk._parts(names, 16)] == [16, 4]
    assert bulk._parts(["a.tar", "b.tar"], 4) == [["a.tar"], ["b.tar"]]
    assert bulk._parts(["1.png", "2.png", "a.tar", "b.tar", "3.png"], 4) == [
        ["1.png", "2.png"],
        ["a.tar"],
        ["b.tar"],
        ["3.png"],
    ]


def test_an_actor_that_has_no_room_is_refused():
    """Ray would wait for ever."""
    assert bulk._most_actors({"CPU": 8.0}, 3, 0) == 2
    assert bulk._most_actors({"CPU": 8.0, "GPU": 2.0}, 1, 0.5) == 4
    for resources, threads, gpus in (({"CPU": 8.0}, 9, 0), ({"CPU": 8.0}, 1, 1), ({}, 1, 0)):
        with pytest.raises(ValueError, match=r"an actor takes .*, and the cluster has"):
            bulk._most_actors(resources, threads, gpus)
    with pytest.raises(ValueError, match="batch_size=0"):
        bulk._parts(samples(), 0)


@needs_ray
def test_a_uri_with_a_query_or_escapes(tmp_path):
    (tmp_path / "two words").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "two words" / name).write_bytes(picture(0))
    address = f"file://{tmp_path}/two%20words"
    expected = [f"file://{tmp_path}/two words/{n}.png" for n in (1, 2)]
    for query in ("", "?region=here"):
        for path, names in (("", expected), ("/*.png", expected), ("/2.png", expected[1:])):
            place, found = bulk._sources(address + path + query)
            assert found == names
            assert all(os.path.isfile(place.path_of(name)) for name in found)


@needs_ray
def test_workers_that_die_change_nothing(on_ray, folder, tmp_path):
    """Workers are killed while they embed: each image is in the parts once, as `embed` computes it.

    Two actors with a whole CPU each fit on two CPUs. Run again, parts that are there are not made again.
    """
    expected = quietly(embed, *small_model(), folder / "files")
    killed, done = [], threading.Event()

    def kill():
        while len(killed) < 2 and not done.wait(0.02):
            for name in os.listdir(on_ray.log):
                lines = (on_ray.log / name).read_text().splitlines()
                if len(lines) >= 3 and int(name) not in killed:
                    killed.append(int(name))
                    os.kill(int(name), signal.SIGKILL)
                    break

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert on_ray(folder / "files", seconds=0.1, actors=2)[1:] == (5, 5, 21, 2)
    finally:
        done.set()
        killer.join()
    assert len(killed) == 2
    same(on_ray.output, expected, tmp_path)

    kept = {path: path.stat().st_mtime_ns for path in on_ray.output.iterdir()}
    lost = sorted(kept)[2]
    lost.unlink()
    (on_ray.output / f".{lost.name}.0123.partial").write_bytes(b"half")
    shutil.rmtree(on_ray.log)
    on_ray.log.mkdir()
    assert on_ray(folder / "files")[1:] == (5, 1, 5, 0)
    read = {line for path in on_ray.log.iterdir() for line in path.read_text().splitlines()}
    assert read == {f"{number:02}.png" for number in range(10, 15)}
    assert [path for path, time in kept.items() if path.stat().st_mtime_ns != time] == [lost]
    same(on_ray.output, expected, tmp_path)
    assert on_ray(folder / "files").made == 0


@needs_ray
def test_shards_by_their_uri(on_ray, folder, tmp_path):
    """A part of a shard is what `embed` makes of that shard; parts of another run are refused."""
    source = f"file://{folder}/shards/*.tar"
    assert on_ray(source)[1:] == (3, 3, 21, 2)
    names = []
    for shard in range(3):
        expected = quietly(embed, *small_model(), folder / "shards" / f"{shard}.tar")
        found = load_features(on_ray.output / f"part-{shard:05}-of-00003.parquet")
        np.testing.assert_array_equal(found.features, expected.features)
        assert found.paths == [f"file://{path}" for path in expected.paths]
        assert [name for name, _ in found.damaged] == [f"file://{name}" for name, _ in expected.damaged]
        names += found.paths
    assert merge(on_ray.output, tmp_path / "merged.npy").paths == names

    with pytest.raises(ValueError, match=r"other files, such as part-00000-of-00003"):
        on_ray(folder / "files")
    next(on_ray.output.iterdir()).unlink()
    with pytest.raises(ValueError, match=r"other images \(3 then, 3 now\)"):
        on_ray(folder / "shards")
    with pytest.raises(ValueError, match="normalize True then, False now"):
        on_ray(source, normalize=False)
    assert on_ray(source).made == 1
    assert on_ray(source).made == 0
    with pytest.raises(ValueError, match=r"another model or preprocessing. .*choose another output"):
        quietly(embed_on_ray, load_another, source, on_ray.output)


def load_another(threads):
    model, preprocess = small_model()
    return model, lambda image: preprocess(image) * 2


@needs_ray
def test_a_damaged_image_stops_the_run(on_ray, folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be used: .*17\.png"):
        embed_on_ray(small_model_of, folder / "files" / "1*.png", on_ray.output, progress=False)
    assert not list(on_ray.output.iterdir())


@needs_ray
def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConnectionError, match=r"no Ray cluster at ray://127.0.0.1:9: "):
        embed_on_ray(small_model_of, samples(), tmp_path, "ray://127.0.0.1:9")


def small_model_of(threads):
    return small_model()


@needs_ray
def test_the_command_on_ray(cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["embed", "@samples", "--model", "tiny", "--engine", "eager"]
    assert cli.main([*common, "-o", "whole.npy"]) == 0
    capsys.readouterr()
    assert cli.main([*common, "-o", "out", "--ray", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "out", "parts": 1, "made": 1, "images": 8, "damaged": 0}
    assert cli.main(["merge", "out", "-o", "merged.npy"]) == 0
    np.testing.assert_allclose(np.load("merged.npy"), np.load("whole.npy"), atol=1e-6)
    assert load_features("merged.npy").paths == samples()
    assert cli.main([*common[:1], "missing", *common[2:], "-o", "out2", "--ray"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
