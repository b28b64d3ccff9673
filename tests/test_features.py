"""Features in bulk: their images, their files, interruption at any moment, damaged images, search."""

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image

import fuzz
from embed_slowly import BATCH_SIZE, small_model
from paddle_clip import CheckpointError, Match, compile, embed, features, image_transform, load_features, search
from paddle_clip.images import image_files
from paddle_clip.presets import build
from variants import TINY


@pytest.fixture(scope="module")
def model_and_preprocess():
    return small_model()


@pytest.fixture
def model(model_and_preprocess):
    return model_and_preprocess[0]


@pytest.fixture
def preprocess(model_and_preprocess):
    return model_and_preprocess[1]


DAMAGED = (2, 11)


def path_of(folder, index):
    place = "" if index < 6 else "b" if index < 12 else "b/deep"
    return folder / place / f"{index:02}.{'JPG' if index % 2 else 'png'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of eighteen images in folders, two of them damaged, with other files beside them."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for index in range(18):
        path = path_of(folder, index)
        Image.fromarray(random.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).save(path)
        if index in DAMAGED:
            os.truncate(path, path.stat().st_size // 3)
    (folder / "notes.txt").write_text("not an image")
    for path in (folder / ".hidden" / "x.png", folder / "._00.png"):
        path.write_bytes(b"not to be looked at")
    return folder


@pytest.fixture
def paths(folder):
    return sorted(str(path_of(folder, index)) for index in range(18) if index not in DAMAGED)


def quietly(*arguments, **options):
    """Calls `embed` in batches of five, without damaged images and without their warning."""
    options = {"batch_size": BATCH_SIZE, "on_error": "skip", "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(*arguments, **options)


# --------------------------------------------------------------------------------------------------------------- embed


@pytest.mark.parametrize("normalize", [True, False])
def test_features_are_the_models(model, preprocess, folder, paths, normalize):
    found = quietly(model, preprocess, folder, normalize=normalize)
    with paddle.no_grad():
        expected = model.encode_image(paddle.stack([preprocess(path) for path in paths])).numpy()
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.paths == paths
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, expected, rtol=1e-3, atol=1e-5)


def test_lists_and_data_sets_give_the_same(model, preprocess, folder, paths):
    class Items(paddle.io.Dataset):
        def __init__(self, items):
            self.items = items

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return self.items[index]

    expected = quietly(model, preprocess, paths).features
    opened = [Image.open(path).convert("RGB") for path in paths]
    for images in (
        opened,
        [np.asarray(image) for image in opened],
        Items(paths),
        Items([(path, np.array([3])) for path in paths]),
        Items([preprocess(path) for path in paths]),
        Items([(preprocess(path).numpy(), 3) for path in paths]),
    ):
        found = quietly(model, preprocess, images)
        np.testing.assert_array_equal(found.features, expected)
        assert found.paths == list(range(len(paths)))
    assert quietly(model, preprocess, paths[0]).paths == paths[:1]


def test_workers_and_training_mode_change_nothing(model, preprocess, folder):
    expected = quietly(model, preprocess, folder).features
    np.testing.assert_array_equal(quietly(model, preprocess, folder, workers=1).features, expected)
    model.train()
    statistics = {name: buffer.numpy() for name, buffer in model.named_buffers()}
    np.testing.assert_array_equal(quietly(model, preprocess, folder, workers=5).features, expected)
    assert model.training
    assert all((buffer.numpy() == statistics[name]).all() for name, buffer in model.named_buffers())
    model.eval()


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
def test_files_hold_the_same(model, preprocess, folder, paths, name, tmp_path):
    expected = quietly(model, preprocess, folder)
    output = tmp_path / name
    found = quietly(model, preprocess, folder, output)
    for result in (found, load_features(output)):
        np.testing.assert_array_equal(result.features, expected.features)
        assert result.paths == paths
        assert [path for path, _ in result.damaged] == [str(path_of(folder, index)) for index in DAMAGED]
    assert isinstance(found.features.base, (np.memmap, mmap.mmap)) == (name == "x.npy")
    assert sorted(os.listdir(tmp_path)) == (["x.json", "x.npy"] if name == "x.npy" else ["x.parquet"])
    again = quietly(model, preprocess, paths[:3], output)  # a new result takes the place of an old one
    assert load_features(output).paths == again.paths == paths[:3]


def test_damaged_images_are_fatal_or_reported(model, preprocess, folder, paths, tmp_path):
    output = tmp_path / "x.npy"
    quietly(model, preprocess, paths[:2], output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"image .*02\.png cannot be used: .*on_error='skip' leaves out such images"):
        embed(model, preprocess, folder, output, BATCH_SIZE, progress=False)
    assert output.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.npy"]
    with pytest.warns(RuntimeWarning, match=r"2 images skipped: .*02\.png: cannot read .*; .*11\.JPG: cannot"):
        found = embed(model, preprocess, folder, output, BATCH_SIZE, on_error="skip", progress=False)
    assert all("truncated" in reason.lower() for _, reason in found.damaged)
    assert len(found.features) == len(found.paths) == 16


def test_nothing_but_damage(model, preprocess, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 1 images can be read; cannot read .*x\.png"):
            quietly(model, preprocess, tmp_path, tmp_path / "x.npy")
        assert os.listdir(tmp_path) == ["x.png"]


def test_few_images_are_held_at_once(model, preprocess, paths, monkeypatch):
    decoded, ahead = [], []

    def counted(image):
        decoded.append(image)
        return preprocess.array(image)

    encode_image = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: ahead.append(len(decoded)) or encode_image(pixels))
    embed(model, counted, paths * 3, batch_size=4, progress=False)
    assert len(decoded) == 1 + 3 * len(paths)  # one more is the image of noise
    assert all(count <= 1 + 4 * (index + 3) for index, count in enumerate(ahead[1:]))


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert image_files(tmp_path) == [str(tmp_path / "a" / "x.png")]


def test_what_cannot_be_read_is_refused(model, preprocess, folder, tmp_path, monkeypatch):
    def check(images, error, message, **options):
        with pytest.raises(error, match=message):
            embed(model, preprocess, images, progress=False, **options)

    check(tmp_path / "none", FileNotFoundError, "none")
    check(tmp_path, ValueError, r"has no images: looked for \*\.bmp .*, also deeper")
    check(5, ValueError, "a folder, a list of paths, or a paddle.io.Dataset that can be indexed; found int")
    check(folder, ValueError, "on_error is 'ignore'; choose", on_error="ignore")
    check(folder, ValueError, "batch_size=0 and", batch_size=0)
    check(folder, ValueError, "workers=0; each", workers=0)
    check(folder, ValueError, "choose a name that ends with .npy or .parquet", output="x.txt")
    check(folder, FileNotFoundError, "folder of the output .* does not exist", output=tmp_path / "none" / "x.npy")
    (tmp_path / "dir.npy").mkdir()
    check(folder, ValueError, "exists and is not a file", output=tmp_path / "dir.npy")
    (tmp_path / "x.json").write_text("{}")
    check(folder, ValueError, r"x\.json belongs to something else", output=tmp_path / "x.npy")
    assert sorted(os.listdir(tmp_path)) == ["dir.npy", "x.json"]

    def scandir(path, scandir=os.scandir):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    check(folder, PermissionError, "deep")


# -------------------------------------------------------------------------------------------------------- interruption


class Interrupted:
    """A preprocessing that is interrupted after this number of images."""

    def __init__(self, preprocess, number):
        self.preprocess, self.number, self.count = preprocess, number, 0

    def __call__(self, image):
        self.count += 1
        if self.count > self.number:
            raise KeyboardInterrupt
        return self.preprocess.array(image)


@pytest.mark.parametrize("name", ["x.npy", "x.parquet"])
@pytest.mark.parametrize("number", [1, 2, 6, 11, 14, 17])
def test_interrupted_runs_are_continued(model, preprocess, folder, paths, name, number, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_CHECKPOINT_SECONDS", 0)
    expected = quietly(model, preprocess, folder)
    output = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        quietly(model, Interrupted(preprocess, number), folder, output, workers=1)
    assert not output.exists()
    rest = Interrupted(preprocess, 1000)
    found = quietly(model, rest, folder, output, workers=1)
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.paths == paths
    assert found.damaged == expected.damaged
    assert len(os.listdir(tmp_path)) == (2 if name == "x.npy" else 1)
    # The first image is of noise. A batch is safe once it is encoded, whatever was decoded after it.
    complete = max(number - 1, 0) // BATCH_SIZE * BATCH_SIZE
    assert 1 + 18 - complete <= rest.count <= 1 + 18


def test_killed_runs_are_continued(model, preprocess, folder, paths, tmp_path):
    output, journal = tmp_path / "x.npy", tmp_path / ".x.npy.journal"
    expected = quietly(model, preprocess, folder, tmp_path / "whole.npy")
    command = [sys.executable, os.path.join(ROOT, "tests", "tools", "embed_slowly.py"), str(folder), str(output), "0.2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not output.exists()
    assert not (tmp_path / "x.json").exists()
    rest = Interrupted(preprocess, 1000)
    found = quietly(model, rest, folder, output)
    assert rest.count <= 1 + 18 - 2 * BATCH_SIZE
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert found.paths == expected.paths == paths
    assert sorted(os.listdir(tmp_path)) == ["whole.json", "whole.npy", "x.json", "x.npy"]


@pytest.fixture
def interrupted(model, preprocess, folder, tmp_path, monkeypatch):
    """The output of a run that was interrupted after two batches."""
    monkeypatch.setattr(features, "_CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        quietly(model, Interrupted(preprocess, 16), folder, tmp_path / "x.npy", workers=1)
    assert len((tmp_path / ".x.npy.journal").read_text().splitlines()) >= 3
    return tmp_path / "x.npy"


def test_another_run_does_not_continue_it(model, preprocess, folder, paths, interrupted):
    other = small_model()[0]
    weight = other.visual.conv1.weight
    weight.set_value(weight + 0.01 * paddle.randn(weight.shape))
    kept = {name: (interrupted.parent / name).read_bytes() for name in os.listdir(interrupted.parent)}
    for arguments, options, message in (
        ((model, preprocess, paths), {}, r"other images \(18 then, 16 now\)"),
        ((other, preprocess, folder), {}, "another model or preprocessing"),
        ((model, lambda image: preprocess.array(image) * 0.9, folder), {}, "another model or preprocessing"),
        ((model, preprocess, folder), {"batch_size": 6}, "batch_size 5 then, 6 now"),
        ((model, preprocess, folder), {"normalize": False}, "normalize True then, False now; another"),
    ):
        with pytest.raises(ValueError, match=f"differs from this one: {message}.*resume=False to start anew"):
            quietly(*arguments, interrupted, **options)
        assert {name: (interrupted.parent / name).read_bytes() for name in os.listdir(interrupted.parent)} == kept
    rest = Interrupted(preprocess, 1000)
    found = quietly(model, rest, folder, interrupted, resume=False)
    assert rest.count == 1 + 18
    assert found.paths == paths


def journal_lines(output):
    return [json.loads(line) for line in (output.parent / f".{output.name}.journal").read_text().splitlines()]


def change_journal(output, change):
    """Changes the last line of a journal, and writes it."""
    lines = journal_lines(output)
    change(lines[-1])
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (output.parent / f".{output.name}.journal").write_text(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.update(rows=note["rows"] - 1),
        lambda note: note.update(done=note["done"] + BATCH_SIZE, rows=note["rows"] + BATCH_SIZE),
        lambda note: note.update(rows=-1, done=-1),
        lambda note: note.update(rows=1e9),
        lambda note: note.update(crc32=note["crc32"] ^ 1),
        lambda note: note.update(damaged=[["x", "y"]] * 3),
        lambda note: note.update(damaged=7),
        lambda note: note.clear(),
    ],
)
def test_a_journal_that_does_not_add_up_is_done_again(model, preprocess, folder, interrupted, change):
    change_journal(interrupted, change)
    expected = quietly(model, preprocess, folder)
    rest = Interrupted(preprocess, 1000)
    np.testing.assert_array_equal(quietly(model, rest, folder, interrupted).features, expected.features)
    assert rest.count == 1 + 18


def test_rows_that_were_changed_are_done_again(model, preprocess, folder, interrupted):
    partial = interrupted.parent / ".x.npy.partial"
    content = bytearray(partial.read_bytes())
    content[200] ^= 1
    partial.write_bytes(content)
    expected = quietly(model, preprocess, folder)
    np.testing.assert_array_equal(quietly(model, preprocess, folder, interrupted).features, expected.features)


def test_a_journal_of_other_damaged_images_publishes_nothing(model, preprocess, folder, interrupted):
    lines = journal_lines(interrupted)
    note = next(note for note in lines[1:] if note["damaged"])
    note["damaged"][0][0] = "another"
    journal = interrupted.parent / ".x.npy.journal"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=r"journal is of other images: give resume=False"):
        quietly(model, preprocess, folder, interrupted)
    assert not interrupted.exists()
    assert len(quietly(model, preprocess, folder, interrupted, resume=False).features) == 16


@pytest.mark.parametrize("content", [b"[" * 100_000 + b"\n{}\n", b"\xff\n\n", b"{}\n{}\n", b"9" * 10_000 + b"\n1\n"])
def test_a_damaged_journal_blocks_nothing(model, preprocess, folder, interrupted, content):
    (interrupted.parent / ".x.npy.journal").write_bytes(content)
    assert len(quietly(model, preprocess, folder, interrupted, resume=False).features) == 16
    (interrupted.parent / ".x.npy.journal").write_bytes(content)
    assert len(quietly(model, preprocess, folder, interrupted).features) == 16


@pytest.mark.parametrize("name", [".x.npy.journal", ".x.npy.partial", ".x.json.partial"])
@pytest.mark.parametrize("lay", [os.symlink, os.link])
def test_links_at_hidden_names_are_not_followed(model, preprocess, folder, tmp_path, name, lay):
    (tmp_path / "thesis").write_text("mine")
    lay(tmp_path / "thesis", tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is a link, or no file: delete it"):
        quietly(model, preprocess, folder, tmp_path / "x.npy")
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("name", ["x.npy", "x.json", "y.parquet"])
def test_mutants_are_read_or_refused(tmp_path, name):
    """One error that names the file, or features that fit their paths."""
    width, source = 8, random.Random(0)
    np.save(tmp_path / "x.npy", np.ones([3, width], np.float32))
    (tmp_path / "x.json").write_text(json.dumps({"paths": ["a", "b", "c"], "damaged": [["d", "no image"]]}))
    whole = load_features(tmp_path / "x.npy")
    if name == "y.parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        columns = {
            "path": pyarrow.array(whole.paths),
            "feature": pyarrow.FixedSizeListArray.from_arrays(whole.features.ravel(), width),
        }
        table = pyarrow.table(columns).replace_schema_metadata({"damaged": json.dumps(whole.damaged)})
        parquet.write_table(table, tmp_path / "y.parquet")
    content, read = (tmp_path / name).read_bytes(), 0
    for _ in range(1000):
        (tmp_path / name).write_bytes(fuzz.bytes_level(bytearray(content), source))
        try:
            found = load_features(tmp_path / ("x.npy" if name == "x.json" else name))
        except CheckpointError as error:
            assert str(tmp_path / name.split(".")[0]) in str(error)
        else:
            read += 1
            assert found.features.ndim == 2 and len(found.features) == len(found.paths)
            assert all(isinstance(reason, str) for _, reason in found.damaged)
    assert 10 < read < 900


@pytest.mark.parametrize("harm", ["half a line", "more rows", "fewer rows", "no rows", "no journal"])
def test_whatever_is_left_is_continued_or_done_again(model, preprocess, folder, interrupted, harm):
    partial, journal = interrupted.parent / ".x.npy.partial", interrupted.parent / ".x.npy.journal"
    if harm == "half a line":
        with open(journal, "a") as file:
            file.write('{"done": 15, "ro')
    elif harm == "more rows":
        with open(partial, "ab") as file:
            file.write(b"rows that were not noted")
    elif harm == "fewer rows":
        os.truncate(partial, partial.stat().st_size - 4)
    elif harm == "no rows":
        partial.unlink()
    else:
        journal.unlink()
    expected = quietly(model, preprocess, folder)
    rest = Interrupted(preprocess, 1000)
    np.testing.assert_array_equal(quietly(model, rest, folder, interrupted).features, expected.features)
    assert (rest.count < 1 + 18) == (harm in ("half a line", "more rows"))


def test_one_process_at_a_time(model, preprocess, folder, tmp_path):
    output = tmp_path / "x.npy"

    def second(image):
        if not isinstance(image, Image.Image):
            with pytest.raises(ValueError, match=r"another process is writing .*x\.npy; wait for it"):
                quietly(model, preprocess, folder, output)
        return preprocess.array(image)

    assert len(quietly(model, second, folder, output, workers=1).features) == 16


def test_progress_is_shown_where_asked(model, preprocess, paths, capfd):
    for progress in (None, False, True):
        embed(model, preprocess, paths, progress=progress)
        assert ("16/16" in capfd.readouterr().err) == bool(progress)  # there is no terminal here


# -------------------------------------------------------------------------------------------------------------- search


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A model that knows all tokens, its preprocessing, memory-mapped random features, and their names."""
    from dataclasses import replace

    from paddle_clip import presets

    model = presets.build(replace(TINY["tiny_vit"], context_length=77, vocab_size=49408))
    model.eval()
    path = tmp_path_factory.mktemp("features") / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32) * 3)
    return model, image_transform(32), np.load(path, mmap_mode="r"), [f"{index}.jpg" for index in range(1000)]


@pytest.mark.parametrize("chunk", [8 * 4 * 7, 1 << 20])
@pytest.mark.parametrize("kind", ["text", "path", "image"])
def test_search_is_exact(searched, monkeypatch, kind, chunk, tmp_path):
    model, preprocess, rows, names = searched
    monkeypatch.setattr(features, "_CHUNK", chunk)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "query.png")
    query = {"text": "a dog", "path": tmp_path / "query.png", "image": image}[kind]
    from paddle_clip import tokenize

    with paddle.no_grad():
        target = model.encode_text(tokenize(query)) if kind == "text" else model.encode_image(preprocess(image)[None])
    target = target.numpy()[0].astype(np.float64)
    cosines = (rows @ target) / np.linalg.norm(rows, axis=1) / np.linalg.norm(target)
    best = np.argsort(-cosines)[:20]
    found = search(model, preprocess, rows, names, query, top_k=20)
    assert [match.path for match in found] == [names[row] for row in best]
    np.testing.assert_allclose([match.score for match in found], cosines[best], rtol=1e-5)
    assert len(search(model, preprocess, rows[:3], names[:3], query)) == 3


def test_equal_images_come_in_order(searched, monkeypatch):
    model, preprocess, rows, names = searched
    same = np.repeat(rows[:1], 10, axis=0)
    for rows_at_once in (3, 10):
        monkeypatch.setattr(features, "_CHUNK", 8 * 4 * rows_at_once)
        found = search(model, preprocess, same, names[:10], "a dog", top_k=4)
        assert [match.path for match in found] == names[:4]
    assert isinstance(found[0], Match)


def test_texts_are_as_long_as_the_models():
    from dataclasses import replace

    from paddle_clip import presets

    model = presets.build(replace(TINY["tiny_vit"], context_length=6, vocab_size=49408))
    rows = np.eye(8, dtype=np.float32)
    assert len(search(model, image_transform(32), rows, range(8), "a dog", top_k=3)) == 3
    with pytest.raises(RuntimeError, match="context length is 6"):
        search(model, image_transform(32), rows, range(8), "a dog on a long beach")


def test_what_cannot_be_searched_is_refused(searched, tmp_path):
    model, preprocess, rows, names = searched
    with pytest.raises(ValueError, match=r"features are \[1000, 8\], expected \[999, 8\]"):
        search(model, preprocess, rows, names[:-1], "a dog")
    with pytest.raises(ValueError, match=r"features are \[1000, 7\], expected \[1000, 8\]"):
        search(model, preprocess, rows[:, 1:], names, "a dog")
    with pytest.raises(ValueError, match="top_k=0"):
        search(model, preprocess, rows, names, "a dog", top_k=0)
    with pytest.raises(ValueError, match=r"cannot read .*none\.png as an image"):
        search(model, preprocess, rows, names, tmp_path / "none.png")
    with pytest.raises(RuntimeError, match="context length is 77"):
        search(model, preprocess, rows, names, "long " * 80)


@pytest.mark.parametrize("content", ["{}", "[]", '{"paths": 3, "damaged": []}', '{"paths": ["a"]}', "text"])
def test_paths_that_are_none_are_refused(content, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros([1, 8], np.float32))
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a file of features"):
        load_features(tmp_path / "x.npy")


def test_other_tables_and_archives_are_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for table in ({"x": [1, 2]}, {"path": ["a", "b"], "feature": [[1.0], [2.0]]}):
        parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"x\.parquet is not a file of features"):
            load_features(tmp_path / "x.parquet")
    with open(tmp_path / "y.npy", "wb") as file:
        np.savez(file, x=1)
    with pytest.raises(ValueError, match=r"y\.npy is not a file of features"):
        load_features(tmp_path / "y.npy")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_features(tmp_path / "none.npy")
    np.save(tmp_path / "x.npy", np.zeros([3, 8], np.float32))
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        load_features(tmp_path / "x.npy")
    (tmp_path / "x.json").write_text(json.dumps({"paths": ["a.jpg"], "damaged": []}))
    with pytest.raises(ValueError, match=r"has the shape \[3, 8\], and 1 paths are beside it"):
        load_features(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", None])
def test_another_model_of_the_same_width_finds_nothing(model, preprocess, folder, name, tmp_path):
    found = quietly(model, preprocess, folder, name and tmp_path / name, normalize=False)
    known, names, _ = load_features(tmp_path / name) if name else found
    assert known.made_by["normalized"] is False
    query = path_of(folder, 0)
    compiled = compile(model, engine="paddle")
    assert search(compiled, preprocess, known[::-1], names[::-1], query, top_k=1)[0].path == str(query)
    paddle.seed(8)
    other = build(model.config)
    with pytest.raises(ValueError, match="another model or preprocessing made the features"):
        search(other, preprocess, known, names, query)
    assert len(search(other, preprocess, np.asarray(known), names, query, top_k=3)) == 3  # of unknown origin


def test_files_of_before_are_read(model, preprocess, folder, tmp_path):
    quietly(model, preprocess, folder, tmp_path / "x.npy")
    content = json.loads((tmp_path / "x.json").read_text())
    del content["made_by"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    known, names, _ = load_features(tmp_path / "x.npy")
    assert known.made_by is None and search(model, preprocess, known, names, path_of(folder, 0))
