"""Tar shards: their pictures and captions, what is wrong with them, their order, and training on them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paddle_clip
from embed_slowly import BATCH_SIZE, small_model
from paddle_clip import CLIPConfig, cli, embed, finetune, image_transform, presets, read_pairs
from paddle_clip.shards import members_of, shards_of

CONFIG = CLIPConfig(32, 32, 1, 64, 16, 64, 1, 1, 77, 49408)
PICTURES = 7  # in each shard


def write_shard(path, files):
    """A tar of {name: bytes}, in the order of the dict."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def picture(seed, format="PNG"):
    file, random = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (20 + seed % 9, 30, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards as img2dataset writes them, one of them with captions in .json alone."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        files = {}
        for row in range(PICTURES):
            number = shard * PICTURES + row
            key, caption = f"{number:09}", f"caption  {number}\n"
            files[f"{key}.jpg"] = picture(number, "JPEG")
            if shard < 2:
                files[f"{key}.txt"] = caption.encode()
            files[f"{key}.json"] = json.dumps({"caption": caption, "url": "x"}).encode()
        write_shard(folder / f"{shard:05}.tar", files)
    (folder / "00001_stats.json").write_text(json.dumps({"successes": PICTURES, "failed_to_download": 3}))
    (folder / ".hidden.tar").write_bytes(b"not to be looked at")
    return folder


def test_sources(shards, monkeypatch):
    paths = [str(shards / f"{number:05}.tar") for number in range(3)]
    monkeypatch.chdir(shards.parent)
    for source in (shards, shards / "*.tar", shards / "{00000..00002}.tar", paths, map(str, paths)):
        assert shards_of(source if isinstance(source, (list, os.PathLike)) else list(source)) == paths
    assert shards_of(f"{shards.name}/{{00001..00001}}.tar") == [f"{shards.name}/00001.tar"]
    assert shards_of(shards / "00001_stats.json") == []
    with pytest.raises(FileNotFoundError, match="00003"):
        shards_of(str(shards / "{00002..00003}.tar"))


def test_pairs(shards):
    pairs = read_pairs(shards)
    assert len(pairs) == 3 * PICTURES
    assert [caption for _, caption in pairs] == [f"caption {number}" for number in range(3 * PICTURES)]
    image, caption = pairs[PICTURES + 1]
    assert (str(image), caption) == (f"{shards}/00001.tar/000000008.jpg", "caption 8")
    assert image.read() == picture(8, "JPEG")
    assert pairs[-1][1] == "caption 20" and [text for _, text in pairs[5:9:2]] == ["caption 5", "caption 7"]
    with pytest.raises(IndexError):
        pairs[3 * PICTURES]


def test_every_epoch_takes_each_pair_once_in_an_order_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("paddle_clip.pairs._WINDOW", 2)
    for shard in range(5):
        write_shard(tmp_path / f"{shard}.tar", {f"{n}.{end}": b"x" for n in range(shard + 2) for end in ("png", "txt")})
    pairs, again = read_pairs(tmp_path), read_pairs(tmp_path)
    order = list(pairs.order(3, 0))
    assert sorted(order) == list(range(len(pairs))) != order
    assert [again.order(3, 0)[place] for place in reversed(range(len(pairs)))] == order[::-1]  # from any place
    assert list(pairs.order(3, 1)) != order != list(pairs.order(4, 0))
    owners = np.searchsorted(np.cumsum([2, 3, 4, 5, 6]), order, "right")
    start = 0
    while start < len(order):  # the shards of a window are taken before those of the next
        window = list(dict.fromkeys(owners[start:]))[:2]
        size = sum(shard + 2 for shard in window)
        assert set(owners[start : start + size]) == set(window)
        start += size
    assert np.count_nonzero(np.diff(owners)) > 5  # within a window they are mixed


def test_memory_holds_the_headers_of_few_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("paddle_clip.pairs._WINDOW", 1)
    for shard in range(6):
        write_shard(tmp_path / f"{shard}.tar", {"0.png": b"x", "0.txt": b"y"})
    pairs = read_pairs(tmp_path)
    assert [caption for _, caption in pairs] == ["y"] * 6
    assert pairs._samples.cache_info().currsize == 2


def test_samples_are_files_of_one_key(tmp_path):
    """The key ends at the first dot; folders belong to it; files in between do not matter, nor do capitals."""
    files = {
        "a/1.png": b"",
        "b/1.txt": b"b one",
        "a/1.x.txt": b"a one",
        "._b.png": b"",
        "b/1.seg.PNG": b"",
        "c.txt": b"",
    }
    pairs = read_pairs(write_shard(tmp_path / "x.tar", files))
    assert [(image.name, caption) for image, caption in pairs] == [("a/1.png", "a one"), ("b/1.seg.PNG", "b one")]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"1.png": b"x", "2.png": b"x", "2.txt": b"y"}, r"1 images of .*x.tar have neither a .txt nor a .json: 1.png"),
        ({"1.txt": b"x"}, r"hold no \(image, caption\) pairs"),
        ({"1.png": b"x", "1.txt": b"\xff"}, "1.txt is not a text in UTF-8"),
        ({"1.png": b"x", "1.json": b"[]"}, r"1.json is \[\]; expected a JSON object"),
        ({"1.png": b"x", "1.json": b"{}"}, "the caption of .*1.json is None; expected a text"),
    ],
)
def test_samples_that_are_wrong(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        list(read_pairs(write_shard(tmp_path / "x.tar", files)))


def test_shards_that_are_wrong(tmp_path, shards):
    whole = (shards / "00000.tar").read_bytes()
    last = members_of(shards / "00000.tar")[-1]
    for content in (b"", b"no tar" * 100, whole[: last.offset + last.size // 2], whole[: last.offset - 100]):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"x.tar is damaged, or no tar that is uncompressed"):
            read_pairs(tmp_path / "x.tar")
    for damage in (b"\xff", bytes(512)):  # to tarfile such a header is the end
        start = last.offset - 512
        (tmp_path / "x.tar").write_bytes(whole[:start] + damage + whole[start + len(damage) :])
        with pytest.raises(ValueError, match=rf"x.tar is damaged, .*there is no header at byte {start:,}"):
            read_pairs(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole)
    (tmp_path / "x_stats.json").write_text('{"successes": 6}')
    with pytest.raises(ValueError, match=f"x.tar has {PICTURES} pairs, expected 6: it, or .*x_stats.json, has changed"):
        read_pairs(tmp_path)[0]


def test_of_several_sources_none_is_left_out(tmp_path, shards):
    (tmp_path / "pairs.csv").write_text("image,caption\n")
    for other in ("pairs.csv", "missing"):
        with pytest.raises(ValueError, match=rf"several sources .*; found \S*{other}$"):
            read_pairs([shards, tmp_path / other])


def test_classify_takes_shards(tmp_path, capsys):
    """All pictures of a shard or folder, each with its own labels."""
    model, preprocess = paddle_clip.load("tiny")
    files = paddle_clip.samples()[:3]
    shard = write_shard(tmp_path / "x.tar", {f"{n}.png": Path(file).read_bytes() for n, file in enumerate(files)})
    labels = ["black cross", "blue triangle", "green heart", "red circle"]
    expected = paddle_clip.classify(model, preprocess, files, labels)
    assert [best[0].label for best in expected] == labels[:3]
    for images in (shard, [shard], os.path.dirname(files[0])):
        found = paddle_clip.classify(model, preprocess, images, labels)
        assert [best[0] for best in found[:3]] == [best[0] for best in expected]
    options = ["--labels", *labels, "--model", "tiny", "--top-k", "1", "--json"]
    assert cli.main(["classify", str(shard), files[2], *options]) == 0
    printed = {row["image"]: row["labels"][0]["label"] for row in json.loads(capsys.readouterr().out)}
    assert printed == {**{f"{shard}/{n}.png": labels[n] for n in range(3)}, files[2]: labels[2]}
    assert cli.main(["similarity", str(shard), "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == [f"{shard}/{n}.png" for n in range(3)]


def test_embed_takes_shards(shards, tmp_path):
    """The features are those of the same files in a folder, also where both are in one list."""
    model, preprocess = small_model()
    folder = tmp_path / "files"
    for number in range(3 * PICTURES):
        folder.mkdir(exist_ok=True)
        (folder / f"{number:09}.jpg").write_bytes(picture(number, "JPEG"))
    options = {"batch_size": BATCH_SIZE, "progress": False}
    expected = embed(model, preprocess, folder, **options)
    found = embed(model, preprocess, shards, tmp_path / "x.npy", **options)
    np.testing.assert_array_equal(found.features, expected.features)
    names = [f"{shards}/{number // PICTURES:05}.tar/{number:09}.jpg" for number in range(3 * PICTURES)]
    assert found.paths == names
    paths = [str(folder / f"{number:09}.jpg") for number in range(5)]
    mixed = embed(model, preprocess, [*paths, shards / "00002.tar"], **options)
    assert mixed.paths == paths + names[2 * PICTURES :]
    image = read_pairs(shards)[0][0]
    np.testing.assert_array_equal(preprocess.array(image), preprocess.array(paths[0]))
    (shards / "00000.tar").rename(tmp_path / "0.tar")
    try:
        assert embed(model, preprocess, tmp_path / "files", **options).paths == sorted(map(str, folder.iterdir()))
    finally:
        (tmp_path / "0.tar").rename(shards / "00000.tar")


def test_a_folder_of_images_may_have_a_tar(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.png").write_bytes(picture(1))
    write_shard(tmp_path / "backup.tar", {"2.png": picture(2)})
    model, preprocess = small_model()
    assert embed(model, preprocess, tmp_path, progress=False).paths == [str(tmp_path / "deep" / "1.png")]


def test_a_damaged_image_is_named(tmp_path):
    model, preprocess = small_model()
    shard = write_shard(tmp_path / "x.tar", {"1.png": picture(1), "2.png": picture(2)[:300]})
    with pytest.warns(RuntimeWarning, match="1 images skipped"):
        found = embed(model, preprocess, shard, on_error="skip", progress=False)
    assert found.paths == [f"{shard}/1.png"] and [name for name, _ in found.damaged] == [f"{shard}/2.png"]
    write_shard(shard, {"1.png": b"no picture", "1.txt": b"x"})
    with pytest.raises(ValueError, match=f"image {shard}/1.png cannot be used"):
        finetune(tiny(), read_pairs(shard), batch_size=1)


def tiny():
    return presets.build(CONFIG)


def test_training_resumes_at_a_sample(shards, tmp_path):
    """A training that stops within an epoch of shards goes on with the same pairs, to the same bits."""
    pairs, model = read_pairs(shards), tiny()
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    options = {"preprocess": image_transform(CONFIG.image_resolution), "epochs": 2, "batch_size": 4, "workers": 2}

    def train(on_step=None, **more):
        model.set_state_dict(before)
        steps = finetune(model, read_pairs(shards), on_step=on_step, **options, **more)
        return steps, {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    class Stop(Exception):
        pass

    def stop(step):
        if step.step == 7:
            raise Stop

    steps, expected = train()
    assert len(steps) == 2 * (len(pairs) // 4)
    with pytest.raises(Stop):
        train(stop, output=tmp_path / "x.pdparams", save_every=3)
    resumed, found = train(output=tmp_path / "x.pdparams", save_every=3, resume=True)
    assert [step.loss for step in resumed] == [step.loss for step in steps[6:]]
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
