"""Compiled forms in the cache: made once, found again, mended, bounded, cleared; and what commands choose."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from test_shards import write_shard

import paddle_clip
from paddle_clip import cli, compiled, deploy, presets, translation
from paddle_clip.cli import shared
from paddle_clip.images import pictures_of

SMALL = presets.CLIPConfig(8, 32, 1, 64, 16, 64, 1, 1)  # of the full vocabulary
needs_openvino = pytest.mark.skipif(not deploy.PADDLE_3, reason="files for OpenVINO take Paddle 3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with one compiled form, and the checkpoint it is of."""
    folder = tmp_path_factory.mktemp("compiled")
    paddle.seed(0)
    paddle_clip.save(presets.build(SMALL), folder / "small.pdparams")
    paddle_clip.load_compiled(folder / "small.pdparams", engine="paddle", cache_dir=folder / "cache")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of both, as the cache of this test's commands."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.setenv("PADDLE_CLIP_CACHE", str(tmp_path / "copy" / "cache"))
    return tmp_path / "copy"


def images(count=3):
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32), np.float32)


def test_a_form_computes_what_the_model_does(place, monkeypatch):
    monkeypatch.setattr(compiled, "_make", lambda *_: pytest.fail("it is in the cache"))
    predictor, preprocess = paddle_clip.load_compiled(place / "small.pdparams", engine="paddle")
    model, _ = paddle_clip.load(place / "small.pdparams")
    with paddle.no_grad():
        expected = model.encode_image(paddle.to_tensor(images())).numpy()
    np.testing.assert_allclose(predictor.encode_image(images()), expected, atol=1e-5)
    assert predictor.engine == "paddle"
    assert preprocess(np.zeros([40, 40, 3], np.uint8)).shape == [3, 32, 32]


@needs_openvino
def test_openvino_is_the_default_where_it_is_installed(place, monkeypatch):
    predictor, _ = paddle_clip.load_compiled(place / "small.pdparams")
    assert predictor.engine == "openvino"
    assert len(compiled.forms()) == 2
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert compiled.default_engine(str(place / "small.pdparams")) == "paddle"
    for module in (compiled, translation):  # as for a ViT-H-14, whose image tower ONNX cannot hold
        monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert compiled.default_engine(str(place / "small.pdparams")) == "paddle"
    assert compiled.default_engine(str(place / "small.pdparams"), "bfloat16") == "paddle"
    assert compiled.default_engine(str(place / "small.pdparams"), "int8") == "openvino"


def test_other_weights_have_another_form(place):
    paddle.seed(1)
    paddle_clip.save(presets.build(SMALL), place / "small.pdparams")  # other random weights, the same name
    assert not compiled.has_form(place / "small.pdparams", "paddle")
    paddle_clip.load_compiled(place / "small.pdparams", engine="paddle")
    assert compiled.has_form(place / "small.pdparams", "paddle")
    assert len(compiled.forms()) == 2


def test_other_versions_have_another_form(place, monkeypatch):
    assert compiled.has_form(place / "small.pdparams", "paddle")
    assert not compiled.has_form(place / "small.pdparams", "openvino")
    monkeypatch.setattr(compiled, "version_of", lambda package: "0.0")
    assert not compiled.has_form(place / "small.pdparams", "paddle")


def test_a_damaged_form_is_made_again_with_one_warning(place):
    (form,) = compiled.forms()
    with open(os.path.join(form.folder, "image.pdiparams"), "r+b") as file:
        file.write(b"damage")
    with pytest.warns(RuntimeWarning, match="is damaged and is made again") as told:
        predictor, _ = paddle_clip.load_compiled(place / "small.pdparams", engine="paddle")
    assert len([warning for warning in told if "made again" in str(warning.message)]) == 1
    assert np.isfinite(predictor.encode_image(images())).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        paddle_clip.load_compiled(place / "small.pdparams", engine="paddle")


def test_the_cache_is_bounded(place, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_FORMS", 1)
    (old,) = compiled.forms()
    paddle_clip.save(presets.build(SMALL), place / "other.pdparams")
    paddle_clip.load_compiled(place / "other.pdparams", engine="paddle")
    (new,) = compiled.forms()
    assert new.folder != old.folder
    assert os.path.basename(new.folder).startswith("other-paddle-")


def test_the_command_tells_sizes_and_clears(place, capsys):
    (form,) = compiled.forms()
    assert cli.main(["cache", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["folder"] == form.folder
    assert told["bytes"] == sum(os.path.getsize(entry) for entry in os.scandir(form.folder)) > 0
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.endswith(" MB deleted\n")
    assert compiled.forms() == []
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out.split() == ["0", "MB", "in", "all"]


def chosen(monkeypatch, *options, images=1, openvino=True, form=False, gpu=False):
    """The engine a command takes."""
    monkeypatch.setattr(compiled, "makes_openvino", lambda: openvino)
    monkeypatch.setattr("paddle_clip.extras.is_gpu_build", lambda: gpu)
    monkeypatch.setattr(compiled, "has_form", lambda *_, **__: form)
    options = ("--model", "tiny", *options)
    arguments = cli.main.__globals__["build_parser"]().parse_args(["classify", "x.png", "--labels", "a", *options])
    return shared._choose_engine(arguments, images)


def test_what_auto_chooses(monkeypatch):
    assert chosen(monkeypatch) == "eager"
    assert chosen(monkeypatch, images=shared.WORTH_COMPILING) == "openvino"
    assert chosen(monkeypatch, form=True) == "openvino"
    assert chosen(monkeypatch, openvino=False) == "eager"
    assert chosen(monkeypatch, form=True, openvino=False) == "paddle"
    assert chosen(monkeypatch, "--dtype", "float64", form=True) == "eager"
    assert chosen(monkeypatch, "--device", "gpu", form=True) == "eager"
    assert chosen(monkeypatch, form=True, gpu=True) == "eager"
    assert chosen(monkeypatch, "--precision", "bfloat16") == "openvino"
    assert chosen(monkeypatch, "--precision", "bfloat16", openvino=False) == "paddle"
    assert chosen(monkeypatch, "--precision", "int8", openvino=False) == "openvino"


def test_auto_takes_paddles_layers_where_nothing_can_be_compiled(tmp_path, monkeypatch, capsys):
    tower = {
        name: tensor for name, tensor in paddle_clip.load("tiny")[0].state_dict().items() if name.startswith("visual.")
    }
    paddle.save(tower, str(tmp_path / "tower.pdparams"))
    for openvino in (True, False):
        found = chosen(monkeypatch, "--model", str(tmp_path / "tower.pdparams"), images=10**6, openvino=openvino)
        assert found == "eager"
    (tmp_path / "file").touch()
    monkeypatch.undo()
    monkeypatch.setenv("PADDLE_CLIP_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(shared, "WORTH_COMPILING", 1)
    classify = ["classify", "@samples", "--labels", "a", "--model", "tiny"]
    assert cli.main(classify) == 0
    assert "warning: Paddle's layers run the model, as the cache" in capsys.readouterr().err
    assert cli.main([*classify, "--engine", "paddle"]) == 1


def test_what_is_asked_for_stands(monkeypatch):
    for engine in ("eager", "paddle", "openvino"):
        assert chosen(monkeypatch, "--engine", engine, images=10**6, form=True) == engine
    for options in (
        ["--engine", "paddle", "--dtype", "float64"],
        ["--engine", "openvino", "--device", "gpu"],
        ["--precision", "bfloat16", "--device", "gpu"],
        ["--precision", "int8", "--dtype", "float64"],
    ):
        with pytest.raises(ValueError, match="compiled forms are for the CPU and float32"):
            chosen(monkeypatch, *options)
    with pytest.raises(ValueError, match="bfloat16 takes a compiled form: leave --engine out"):
        chosen(monkeypatch, "--engine", "eager", "--precision", "bfloat16")


def test_commands_with_each_engine_say_the_same(place, capsys, tmp_path):
    """Labels are the same and features differ by rounding; a run is not continued by another engine."""
    results = {}
    common = ["--model", str(place / "small.pdparams")]
    for engine in ("eager", "paddle"):
        command = ["classify", "@samples", "--labels", "a dog", "a cat", "--json", "--engine", engine, *common]
        assert cli.main(command) == 0
        results[engine] = json.loads(capsys.readouterr().out)
        assert cli.main(["embed", "@samples", "-o", str(tmp_path / f"{engine}.npy"), "--engine", engine, *common]) == 0
        assert cli.main(["search", str(tmp_path / f"{engine}.npy"), "a dog", "--engine", engine, *common]) == 0
        capsys.readouterr()
    for eager, other in zip(results["eager"], results["paddle"]):
        assert eager["labels"][0]["probability"] == pytest.approx(other["labels"][0]["probability"], abs=1e-4)
    features = [np.load(tmp_path / f"{engine}.npy") for engine in ("eager", "paddle")]
    np.testing.assert_allclose(*features, atol=1e-5)


@needs_openvino
def test_int8_is_quantised_by_the_pictures_at_hand(place, capsys, tmp_path, monkeypatch):
    common = ["--model", str(place / "small.pdparams"), "--precision", "int8"]
    command = ["embed", "@samples", "-o", str(tmp_path / "int8.npy"), *common]
    assert cli.main(command) == 1
    assert "int8 is quantised by pictures, and calibration has 8; give 100 or more" in capsys.readouterr().err
    monkeypatch.setattr(compiled, "FEWEST_PICTURES", 8)
    assert cli.main(command) == 0
    predictor, _ = paddle_clip.load_compiled(
        place / "small.pdparams", calibration=paddle_clip.samples(), precision="int8"
    )
    assert predictor.precision == "int8"
    assert len(compiled.forms()) == 2  # the second time it was there
    exact, _ = paddle_clip.load_compiled(place / "small.pdparams", engine="paddle")
    ours, theirs = (encoder.encode_image(images()) for encoder in (predictor, exact))
    assert 0 < np.abs(ours - theirs).max() < 0.5 * np.abs(theirs).max()


def test_pictures_for_int8_may_be_damaged_or_in_shards(place, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FEWEST_PICTURES", 8)
    _, preprocess = paddle_clip.load(place / "small.pdparams")
    contents = {f"{n}.png": Path(file).read_bytes() for n, file in enumerate(paddle_clip.samples())}
    pictures = pictures_of(write_shard(tmp_path / "x.tar", {**contents, "broken.png": b"no picture"}))
    expected = np.stack([preprocess.array(file) for file in paddle_clip.samples()])
    np.testing.assert_array_equal(compiled._pixels(preprocess, pictures), expected)
    with pytest.raises(ValueError, match="int8 takes 8 pictures or more, and of 8 only 7 can be read"):
        compiled._pixels(preprocess, pictures[1:])
    assert compiled._identity(pictures[0])[0] == f"{tmp_path / 'x.tar'}/0.png"


def test_the_pictures_for_int8_are_spread():
    assert compiled._spread([str(number) for number in range(601)]) == [str(number) for number in range(0, 601, 3)]
    assert len(compiled._spread(["x"] * 300)) == 300


def test_commands_take_an_export(place, capsys, tmp_path, monkeypatch):
    model, _ = paddle_clip.load(place / "small.pdparams")
    paddle_clip.export(model, tmp_path / "exported")
    command = ["classify", "@samples", "--labels", "a dog", "a cat", "--model"]
    said = []
    for name in (place / "small.pdparams", tmp_path / "exported"):
        assert cli.main([*command, str(name)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cli.main([*command, str(tmp_path / "exported"), "--engine", "eager"]) == 1
    assert "holds compiled forms alone" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "exported"), "--resolution", "64", "--dtype", "float64"]) == 1
    assert "is an export, which stays as it was made: leave --resolution, --dtype out" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main([*command[:-1], "--model=~/exported"]) == 0
    assert capsys.readouterr().out == said[0]
