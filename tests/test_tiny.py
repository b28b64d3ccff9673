"""The model in the package: its accuracy, its size, and the script that made it."""

import io
import json
import os

import numpy as np
import paddle
import pytest
from conftest import ROOT

import paddle_clip
import parity
import tiny_world
import tiny_world_cn
import train_tiny
from paddle_clip import presets
from paddle_clip.checkpoints.conversion import check
from paddle_clip.checkpoints.files import sha256

DATA = os.path.join(ROOT, "paddle_clip", "data")
FILE = os.path.join(DATA, presets.TINY.file)
SAMPLES = os.path.join(DATA, "samples")
SCRIPT = os.path.join("examples", "train_tiny.py")
NAMES = [" ".join(pair) for pair in tiny_world.COMBINATIONS]


@pytest.fixture(scope="module")
def tiny():
    return paddle_clip.load("tiny")


@pytest.fixture(scope="module")
def record():
    with open(os.path.join(DATA, "clip_tiny.json"), encoding="utf-8") as file:
        return json.load(file)


def classified(model, images):
    """The most probable of all combinations for each of the images [N, 3, R, R]."""
    texts = paddle_clip.tokenize([f"a photo of a {name}." for name in NAMES])
    with paddle.no_grad():
        return [NAMES[index] for index in model(images, texts)[0].argmax(axis=-1).tolist()]


def test_it_loads_without_a_network_or_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PADDLE_CLIP_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("it went to the network"))
    model, preprocess = paddle_clip.load("tiny")
    assert not os.listdir(tmp_path)
    assert not model.training
    assert preprocess(os.path.join(SAMPLES, "red-circle.png")).shape == [3, 64, 64]


def test_it_is_named_but_no_model_of_openais():
    assert "tiny" not in paddle_clip.available_models()
    assert presets.TINY not in presets.PRESETS
    with pytest.raises(ValueError, match="did you mean tiny"):
        paddle_clip.load("tinny")
    assert check(FILE)[0].preset == "tiny"


def test_the_factory_builds_its_sizes(tiny):
    fresh = paddle_clip.clip_tiny()
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in tiny[0].state_dict().items()}
    assert sum(parameter.size for parameter in fresh.parameters()) == presets.TINY.parameters


def test_what_it_weighs(record):
    assert os.path.getsize(FILE) == record["bytes"] < 8e6
    assert sum(entry.stat().st_size for entry in os.scandir(SAMPLES)) < 150e3


def test_the_record_is_of_this_file(record):
    assert sha256(FILE) == record["sha256"]
    held_out = record["accuracy in percent"]["held out"]
    assert held_out["colour and shape"] >= 95
    assert held_out["colour and shape of one large object, asked for one"] >= 95
    assert record["held out"] == [" ".join(pair) for pair in tiny_world.HELD_OUT]
    assert record["choices"] == len(NAMES) == 96


def test_it_knows_the_samples(tiny):
    model, preprocess = tiny
    files = sorted(os.listdir(SAMPLES))
    assert len(files) == 8
    images = paddle.stack([preprocess(os.path.join(SAMPLES, file)) for file in files])
    assert classified(model, images) == [file[: -len(".png")].replace("-", " ") for file in files]


def test_it_knows_combinations_it_was_not_trained_on(tiny):
    """The pictures are drawn now, from another seed than the record's."""
    scenes = train_tiny.test_pictures(tiny_world.HELD_OUT, 380, seed=1234)
    accuracy = train_tiny.evaluate(*tiny, *scenes)
    assert accuracy["colour and shape"] >= 95
    assert accuracy["colour and shape of one large object, asked for one"] >= 95


def test_words_it_never_read_say_nothing(tiny):
    model, _ = tiny
    with paddle.no_grad():
        dog, cat, red, blue = model.encode_text(paddle_clip.tokenize(["a dog", "a cat", "a red star", "a blue star"]))
    assert paddle.equal_all(dog, cat)
    assert not paddle.allclose(red, blue, atol=0.1)


def test_parity_with_openais_code_on_trained_weights(tiny):
    _, preprocess = tiny
    files = sorted(os.listdir(SAMPLES))
    images = np.stack([preprocess(os.path.join(SAMPLES, file)).numpy() for file in files])
    captions = [f"a photo of a {file[:-4].replace('-', ' ')}." for file in files]
    inputs = {"images": images.astype(np.float64), "tokens": paddle_clip.tokenize(captions).numpy()}
    names = parity.stages(presets.TINY.config)
    runs = parity.Run(inputs, "float64", names), parity.Run(inputs, "float32", digests=True)
    (ours, truth), (ours32, theirs) = parity.compare(FILE, FILE, *runs)
    assert truth.keys() == ours.keys() == {*names, *parity.OUTPUTS}
    for name, array in truth.items():
        assert parity.difference(ours[name], array)[1] <= parity.FLOAT64_BOUND, name
    assert (truth["logits_per_image"].argmax(axis=1) == np.arange(len(files))).all()
    for name in parity.OUTPUTS:
        assert parity.error_ratio([ours32[name]], [theirs[name]], [truth[name]]) <= parity.FLOAT32_RATIO, name
    for name in (name for name in theirs if name.startswith("digest.")):
        assert (ours32[name] == theirs[name]).all(), name


def test_the_script_trains_and_saves(run, tmp_path):
    arguments = ["--steps", 20, "--batch-size", 16, "--pictures", 24, "--output", tmp_path / "out"]
    done = run(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == ["clip_tiny.json", "clip_tiny.pt", "samples"]
    model, _ = paddle_clip.load(out / "clip_tiny.pt")
    assert all(np.isfinite(parameter.numpy()).all() for parameter in model.parameters())
    fresh = paddle_clip.clip_tiny()
    assert not paddle.allclose(model.text_projection, fresh.text_projection, atol=1e-3)
    written = json.loads((out / "clip_tiny.json").read_text(encoding="utf-8"))
    assert written["sha256"] == sha256(out / "clip_tiny.pt")
    assert written["steps"] == written["loss"][-1][0] == 20
    for entry in os.scandir(SAMPLES):  # the pictures in the package are those the script draws
        ours, theirs = (np.asarray(tiny_world.Image.open(path)) for path in (entry.path, out / "samples" / entry.name))
        assert np.abs(ours.astype(int) - theirs).max() <= 1, entry.name


def test_shards_hold_the_same_pairs_and_train(run, tmp_path):
    script, sizes = os.path.join("examples", "tiny_shards.py"), ("--steps", 3, "--batch-size", 4, "--pictures", 10)
    assert run(script, "write", tmp_path, *sizes).returncode == 0
    pairs = paddle_clip.read_pairs(tmp_path)
    assert len(pairs) == 12
    pictures, captions = train_tiny.Batches(3, 4, 64, 0).drawn(1)
    assert captions == [caption for _, caption in pairs[4:8]]
    for picture, (image, _) in zip(pictures, pairs[4:8]):
        assert picture.tobytes() == tiny_world.Image.open(io.BytesIO(image.read())).tobytes()
    assert run(script, "train", tmp_path, *sizes).returncode == 0
    done = run(script, "test", tmp_path, *sizes)
    assert done.stdout.count("colour and shape, asked for one object") == 2, done.stderr


def test_the_script_refuses_what_makes_no_sense(run, tmp_path):
    for option, value, words in (("--steps", 0, "must be 1 or more"), ("--batch-size", 52, "must be 51 or less")):
        done = run(SCRIPT, option, value, "--output", tmp_path / "out")
        assert done.returncode == 2
        assert words in done.stderr
    assert not os.listdir(tmp_path)


def test_no_caption_of_a_batch_is_true_of_another_picture():
    for seed, variety in enumerate((0, 0, 0.5, 1, 1)):
        pairs = tiny_world.random_pairs(np.random.default_rng(seed), tiny_world.MOST_PAIRS, variety)
        assert len(pairs) == tiny_world.MOST_PAIRS
        fits = np.array([[pair.fits(other.scene) for other in pairs] for pair in pairs])
        assert (fits == np.eye(len(pairs), dtype=bool)).all()


def test_what_is_held_out_is_never_trained_on():
    held_out = set(tiny_world.HELD_OUT)
    assert len(held_out) == 19
    assert {shape for _, shape in held_out} == set(tiny_world.SHAPES)
    assert {colour for colour, _ in held_out} == set(tiny_world.COLOURS)
    random = np.random.default_rng(0)
    for _ in range(20):
        pairs = tiny_world.random_pairs(random, 48, random.random())
        assert held_out.isdisjoint(pair.scene[:2] for pair in pairs)
        for pair in pairs:  # the caption tells the colour and the shape
            words = tiny_world.caption(*pair, random).replace("grey", "gray")
            assert pair.scene.colour in words
            assert pair.scene.shape in words


def test_the_example_of_finetuning_starts(run):
    """Its data are drawn when it is imported; the training itself takes minutes."""
    done = run("-c", "import sys; sys.path.insert(0, 'examples'); import finetune; print(len(finetune.NEW))")
    assert done.stdout.strip() == "5", done.stderr


# ------------------------------------------------------------------------------------------------------------- Chinese


def test_it_knows_its_world_in_chinese():
    with open(os.path.join(DATA, "clip_tiny_cn.json"), encoding="utf-8") as file:
        record = json.load(file)
    path = os.path.join(DATA, presets.TINY_CN.file)
    assert sha256(path) == record["sha256"]
    assert os.path.getsize(path) == record["bytes"] < 5e6
    assert record["parameters"] == presets.TINY_CN.parameters
    held_out = record["accuracy in percent"]["held out"]
    assert held_out["colour and shape"] >= 95
    model, preprocess = paddle_clip.load("tiny_cn")
    names = {tiny_world_cn.name(*pair): pair for pair in tiny_world.COMBINATIONS}
    found = paddle_clip.classify(model, preprocess, paddle_clip.samples(), list(names))
    for path, best in zip(paddle_clip.samples(), found):
        assert "-".join(names[best[0].label]) == os.path.splitext(os.path.basename(path))[0]


def test_what_it_measures_on_pictures_of_combinations_it_never_read_of():
    """The figure in the record, on fewer pictures."""
    model, preprocess = paddle_clip.load("tiny_cn")
    scenes, pictures = train_tiny.test_pictures(tiny_world.HELD_OUT, 190, seed=1)
    accuracy = train_tiny.evaluate(model, preprocess, scenes, pictures, tiny_world_cn)
    assert accuracy["colour and shape"] >= 90


def test_its_script_trains_and_saves(run, tmp_path):
    script = os.path.join("examples", "train_tiny_cn.py")
    done = run(script, "--steps", "3", "--batch-size", "4", "--pictures", "10", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["clip_tiny_cn.json", "clip_tiny_cn.pt"]
    model, _ = paddle_clip.load(tmp_path / "clip_tiny_cn.pt")
    tiny = paddle_clip.load("tiny")[0]
    for name, tensor in tiny.visual.state_dict().items():  # the image tower stays as it is
        np.testing.assert_allclose(model.visual.state_dict()[name].numpy(), tensor.numpy(), atol=1e-3)
