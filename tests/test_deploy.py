import importlib.util
import json
import os
import random
import re
import shutil
import types

import numpy as np
import paddle
import pytest

import paddle_clip
from paddle_clip import CheckpointError, deploy, engines, presets, translation
from paddle_clip import exported as exported_folder
from paddle_clip.checkpoints.files import crc32_of_file
from paddle_clip.encoding import unit
from paddle_clip.errors import LONGEST
from paddle_clip.presets import build
from variants import VARIANTS

# Paddle 3 is tested with the extras, Paddle 2 without them.
EXTRAS = deploy.PADDLE_3
needs_extras = pytest.mark.skipif(not EXTRAS, reason="files for ONNX and OpenVINO take Paddle 3")
ENGINES = ["paddle", pytest.param("openvino", marks=needs_extras)]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def exported(request, tmp_path_factory):
    """A model and the folder it was exported to."""
    paddle.seed(0)
    model = build(VARIANTS[request.param])
    for parameter in model.parameters():  # fresh norms are ones and zeros: a wrong fold would not show
        if parameter.ndim == 1:
            parameter.set_value(parameter + paddle.rand(parameter.shape) * 0.3)
    for name, buffer in model.named_buffers():
        buffer.set_value(buffer + paddle.rand(buffer.shape) * 0.3 if "_variance" in name else buffer + 0.1)
    model.eval()
    directory = tmp_path_factory.mktemp("exports") / "model"
    paddle_clip.export(model, directory, onnx=EXTRAS, openvino=EXTRAS)
    return model, directory


@pytest.fixture(scope="module", params=ENGINES)
def predictor(request, exported):
    return paddle_clip.Predictor(exported[1], engine=request.param)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the export, which a test may harm."""
    return shutil.copytree(exported[1], tmp_path / "copy")


def failing(*arguments):
    raise OSError("disk full")


def images_and_texts(model, batch=9):
    random = np.random.default_rng(0)
    size, length = model.visual.input_resolution, model.context_length
    tokens = np.zeros((batch, length), np.int64)
    for row, end in zip(tokens, random.permutation(np.linspace(2, length, batch).astype(int))):
        row[: end - 1] = random.integers(1, model.vocab_size - 1, end - 1)
        row[end - 1] = model.vocab_size - 1
    return random.standard_normal((batch, 3, size, size), np.float32), tokens


def assert_close(ours, expected):
    cosine = (ours * expected).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() >= 1 - 1e-6
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_same_features_and_logits(exported, predictor):
    model, _ = exported
    images, tokens = images_and_texts(model)
    with paddle.no_grad():
        image_features = model.encode_image(paddle.to_tensor(images)).numpy()
        text_features = model.encode_text(paddle.to_tensor(tokens)).numpy()
        logits = model(paddle.to_tensor(images), paddle.to_tensor(tokens))
    for rows in (1, 3, 9, 9):  # 9 twice: Paddle has been seen to overwrite weights in the first run
        assert_close(predictor.encode_image(images[:rows]), image_features[:rows])
        assert_close(predictor.encode_text(tokens[:rows]), text_features[:rows])
        assert_close(predictor.encode_text(tokens[:rows], trim=False), text_features[:rows])
    for ours, expected in zip(predictor(images, tokens[:5]), (logits[0][:, :5], logits[1][:5])):
        np.testing.assert_allclose(ours, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_batch_is_run_in_parts(exported, engine):
    """Rows come back in their order, whichever run together."""
    model, directory = exported
    at_once, parts = (paddle_clip.Predictor(directory, engine=engine) for _ in range(2))
    parts._images_at_once, parts._tokens_at_once = 4, model.context_length + 3
    if engine == "paddle":
        parts._towers["image"]._rows = 4
    images, tokens = images_and_texts(model)
    expected = at_once.encode_image(images)
    for rows in (9, 7, 2):  # full parts and one image; a full and a padded part; two single ones
        assert_close(parts.encode_image(images[:rows]), expected[:rows])
    assert_close(parts.encode_text(tokens), at_once.encode_text(tokens))


def test_arrays_in_arrays_out_and_tensors_in_tensors_out(exported, predictor):
    model, _ = exported
    images, tokens = images_and_texts(model, 2)
    for kind in (np.asarray, paddle.to_tensor):
        outputs = [predictor.encode_image(kind(images)), predictor.encode_text(kind(tokens))]
        outputs += predictor(kind(images), kind(tokens))
        assert {type(output) for output in outputs} == {type(kind(images))}
        assert [list(output.shape) for output in outputs[2:]] == [[2, 2], [2, 2]]


def test_inputs_of_every_dtype_and_none_at_all(exported, predictor):
    model, _ = exported
    images, tokens = images_and_texts(model, 2)
    expected = predictor.encode_image(images)
    for dtype, tolerance in (("float64", 0), ("float16", 1e-2), ("bfloat16", 1e-1)):
        found = predictor.encode_image(paddle.to_tensor(images).astype(dtype)).numpy()
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert np.array_equal(predictor.encode_text(tokens.astype(np.int32)), predictor.encode_text(tokens))
    width = model.text_projection.shape[1]
    assert predictor.encode_image(images[:0]).shape == predictor.encode_text(tokens[:0]).shape == (0, width)
    assert [logits.shape for logits in predictor(images[:0], tokens)] == [(0, 2), (2, 0)]


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = build(VARIANTS["resnet"])
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    paddle_clip.export(model, tmp_path / "model")
    assert model.training
    assert all(np.array_equal(tensor.numpy(), before[name]) for name, tensor in model.state_dict().items())
    images, tokens = map(paddle.to_tensor, images_and_texts(model, 2))
    model(images, tokens)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("engine", [None, *ENGINES])
def test_compile_equals_export_and_leaves_no_file(tmp_path, monkeypatch, engine):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = build(VARIANTS["vit"])
    model.eval()
    predictor = paddle_clip.compile(model, threads=1, engine=engine)
    assert predictor.threads == 1
    assert predictor.engine == (engine or ("openvino" if EXTRAS else "paddle"))
    images, _ = images_and_texts(model, 2)
    with paddle.no_grad():
        assert_close(predictor.encode_image(images), model.encode_image(paddle.to_tensor(images)).numpy())
    assert os.listdir(tmp_path) == []


def test_runs_without_the_networks(exported, run):
    code = (
        "import sys, paddle_clip; p = paddle_clip.Predictor(sys.argv[1]); "
        "import numpy as np; print(p.encode_image(np.zeros([2, 3, p.image_resolution, p.image_resolution])).shape); "
        "assert 'paddle_clip.model' not in sys.modules"
    )
    done = run("-c", code, exported[1])
    assert done.returncode == 0, done.stderr
    assert f"(2, {exported[0].text_projection.shape[1]})" in done.stdout


def test_preprocess_fits(exported):
    model, directory = exported
    predictor = paddle_clip.Predictor(directory)
    picture = predictor.preprocess(np.zeros((50, 40, 3), np.uint8))
    assert list(predictor.encode_image(picture.unsqueeze(0)).shape) == [1, model.text_projection.shape[1]]


def test_wrong_inputs(exported, predictor):
    with pytest.raises(ValueError, match=r"images are \[1, 3, 8, 8\]; this model takes"):
        predictor.encode_image(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"tokens are .* this model takes"):
        predictor.encode_text(np.zeros((1, exported[0].context_length + 1), np.int64))


@pytest.mark.parametrize(
    "suffix", [".pdiparams", *(pytest.param(suffix, marks=needs_extras) for suffix in (".onnx", ".xml", ".bin"))]
)
def test_damaged_exports(folder, suffix):
    path = next(path for path in sorted(folder.iterdir()) if path.suffix == suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        paddle_clip.Predictor(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {path.name}"):
        paddle_clip.Predictor(folder)


PROGRAMS = {f"{tower}{end}": 0 for tower in ("image", "text") for end in (".json", ".pdiparams")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99 of the format and this package reads 1"),
        ({"paddle": "1.8.0"}, "exported by Paddle 1.8.0 and this is"),
        ({"format": "other"}, "is not what paddle_clip.export writes"),
        ({"paddle": None}, "no sound value for, paddle;"),
        ({"dtype": []}, "no sound value for, dtype;"),
        ({"logit_scale": "2"}, "no sound value for, logit_scale;"),
        ({"images_at_once": 0, "embed_dim": True}, "no sound value for, embed_dim, images_at_once;"),
        ({"context_length": None, "image_resolution": 1.5}, "no sound value for, context_length, image_resolution;"),
        ({"tokens_at_once": -1}, "no sound value for, tokens_at_once;"),
        ({"crc32": {}}, "no sound value for, crc32;"),
        ({"crc32": {**PROGRAMS, "../../secret": 0}}, "no sound value for, crc32;"),
        ({"crc32": PROGRAMS}, "is damaged: copy|lacks image.json"),
        ({"crc32": ["image.pdiparams"]}, "no sound value for, crc32;"),
    ],
)
def test_other_versions(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        paddle_clip.Predictor(folder, engine="paddle")


def rewrite(folder, name, content):
    """Changes a file of an export on purpose: config.json has its checksum."""
    (folder / name).write_bytes(content)
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["crc32"][name] = crc32_of_file(folder / name)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r'"images_at_once": \d+', '"images_at_once": 1000000000'),
        (r'"images_at_once": \d+', '"images_at_once": 1' + "0" * 4000),
        (r'"images_at_once": \d+', '"images_at_once": 1' + "0" * 5000),
        (r'"logit_scale": [^,]+', '"logit_scale": NaN'),
        (r'"logit_scale": [^,]+', '"logit_scale": 1e300'),
        (r'"context_length": \d+', '"context_length": 2147483647'),
        (r'"embed_dim": \d+', '"embed_dim": 1e3'),
        (r'"version": 1', '"version": "' + "1" * 100_000 + '"'),
        (r'"version": 1', '"version": ' + "[" * 100_000),
        (r'"mean": \[', '"mean": [Infinity,'),
        (r'"image.pdiparams": \d+', '"image.pdiparams": []'),
    ],
)
def test_hostile_numbers(folder, old, new):
    path = folder / "config.json"
    changed, times = re.subn(old, new, path.read_text(), count=1)
    assert times == 1
    path.write_text(changed)
    with pytest.raises(CheckpointError) as error:
        paddle_clip.Predictor(folder, engine="paddle")
    assert len(str(error.value)) <= LONGEST


@pytest.mark.parametrize("name", ["config.json", "image.pdiparams"])
def test_pipes_in_place_of_files(folder, name):
    """Nobody writes into them: reading one would wait for ever."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"is not what|lacks"):
        paddle_clip.Predictor(folder, engine="paddle")


def test_a_program_that_is_not_listed_is_not_run(folder):
    ours, other = (".json", ".pdmodel") if deploy.PADDLE_3 else (".pdmodel", ".json")
    (folder / f"image{other}").write_bytes(b"anything")
    paddle_clip.Predictor(folder, engine="paddle")
    path = folder / "config.json"
    description = json.loads(path.read_text())
    del description["crc32"][f"image{ours}"]
    description["crc32"][f"image{other}"] = crc32_of_file(folder / f"image{other}")
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=f"lacks image{ours} in its config.json"):
        paddle_clip.Predictor(folder, engine="paddle")


def program_with(path, operator):
    """A program whose last operator but one is another."""
    if deploy.PADDLE_3:
        program = json.loads(path.read_text())
        program["program"]["regions"][0]["blocks"][0]["ops"][-2]["#"] = f"1.{operator}"
        return json.dumps(program).encode()
    program = paddle.base.core.ProgramDesc(path.read_bytes())
    program.block(0).op(program.block(0).op_size() - 2).set_type(operator)
    return program.serialize_to_string()


@pytest.mark.parametrize("operator", ["save_combine", "py_func", "print", "while"])
def test_operators_that_do_more_than_compute(folder, operator):
    name = f"text{exported_folder.program_suffix(paddle.__version__)}"
    rewrite(folder, name, program_with(folder / name, operator))
    with pytest.raises(CheckpointError, match=f"{name} uses operators that exports may not use: .*{operator}"):
        paddle_clip.Predictor(folder, engine="paddle")


def test_a_layer_that_does_more_than_compute_is_not_exported(tmp_path):
    model = build(VARIANTS["vit"])
    model.eval()
    model.ln_final.register_forward_post_hook(lambda layer, given, features: paddle.static.Print(features))
    with pytest.raises(CheckpointError, match=r"operators that exports may not use: .*print"):
        paddle_clip.export(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@needs_extras
def test_mutants_of_programs_are_read_or_refused(folder):
    """What a program says is checked before an engine is given it."""
    content, source = (folder / "text.json").read_text(), random.Random(0)
    accepted = 0
    for _ in range(300):
        place = source.randrange(len(content))
        new = source.choice(
            ["", "null", "[", "]", "{", "}", "-1", "9" * 5000, '"', ",", "1e999", "[" * 5000, "\\ud800"]
        )
        (folder / "text.json").write_text(content[:place] + new + content[place + source.choice([0, 1, 5]) :])
        try:
            exported_folder.read_program(str(folder / "text.json"))
            accepted += 1
        except CheckpointError as error:
            assert len(str(error)) <= LONGEST
    assert 0 < accepted < 150


@needs_extras
@pytest.mark.parametrize(("name", "content"), [("image.bin", b""), ("image.bin", b"1234"), ("image.xml", b"<net/>")])
def test_openvino_refuses(folder, name, content):
    rewrite(folder, name, content)
    with pytest.raises(CheckpointError, match=r"image\.xml cannot be loaded"):
        paddle_clip.Predictor(folder, engine="openvino")


@needs_extras
def test_onnx_files_run_elsewhere(exported):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model, directory = exported
    images, tokens = images_and_texts(model)
    with paddle.no_grad():
        expected = {"image": model.encode_image(paddle.to_tensor(images)).numpy()}
        expected["text"] = model.encode_text(paddle.to_tensor(tokens)).numpy()
    for tower, array in (("image", images), ("text", tokens)):
        session = onnxruntime.InferenceSession(directory / f"{tower}.onnx", providers=["CPUExecutionProvider"])
        for rows in (1, 9):
            found = session.run(None, {session.get_inputs()[0].name: array[:rows]})[0]
            assert_close(found, expected[tower][:rows])


def test_engines_there_are_not(exported, tmp_path, monkeypatch):
    model, directory = exported
    for ask in (
        lambda **chosen: paddle_clip.Predictor(directory, **chosen),
        lambda **chosen: paddle_clip.compile(model, **chosen),
    ):
        with pytest.raises(ValueError, match="the engine is 'tensorrt'; choose paddle or openvino"):
            ask(engine="tensorrt")
        with pytest.raises(ValueError, match="threads is 0; give 1 or more"):
            ask(threads=0)
    paddle_clip.export(model, tmp_path / "plain")
    assert paddle_clip.Predictor(tmp_path / "plain").engine == "paddle"
    with pytest.raises(FileNotFoundError, match=r"holds no files for OpenVINO: .* with openvino=True"):
        paddle_clip.Predictor(tmp_path / "plain", engine="openvino")
    monkeypatch.setattr(deploy, "PADDLE_3", False)
    for files in ("onnx", "openvino"):
        with pytest.raises(ValueError, match="files for ONNX and OpenVINO take a float32 model and Paddle 3"):
            paddle_clip.export(model, tmp_path / files, **{files: True})


@needs_extras
def test_without_the_extra(exported, tmp_path, monkeypatch):
    """Paddle is the default without the extra, and asking for the extra tells how to install it."""
    model, directory = exported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert paddle_clip.compile(model).engine == paddle_clip.Predictor(directory).engine == "paddle"
    for ask in (
        lambda: paddle_clip.export(model, tmp_path / "new", onnx=True),
        lambda: paddle_clip.export(model, tmp_path / "new", openvino=True),
        lambda: paddle_clip.compile(model, engine="openvino"),
    ):
        with pytest.raises(ImportError, match=r"not installed: pip install .*paddle2onnx"):
            ask()
    with pytest.raises(ImportError, match=r"openvino is not installed: pip install openvino$"):
        paddle_clip.Predictor(directory, engine="openvino")
    assert os.listdir(tmp_path) == []


@needs_extras
def test_what_paddle2onnx_says_is_passed_on(exported, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"could not translate the image encoder to ONNX \(exit status \d+\): .*image\.json"
    ):
        translation.write_onnx(str(tmp_path), "image")


@needs_extras
def test_towers_larger_than_onnx_holds_are_refused_before_any_work(exported, tmp_path, monkeypatch):
    """Protobuf ends at 2 GiB; a ViT-H-14's image tower has 2.5 GB."""
    model, _ = exported
    assert translation.too_large(presets.preset("ViT-H-14").config).startswith("the image encoder has 2.5 GB of weig")
    assert not translation.too_large(presets.preset("RN50x64").config)
    monkeypatch.setattr(translation, "MOST_BYTES", 1000)
    for files in ("onnx", "openvino"):
        with pytest.raises(ValueError, match=r"the image encoder has .* GB .*: take engine='paddle', or exp"):
            paddle_clip.export(model, tmp_path / "new", **{files: True})
    assert os.listdir(tmp_path) == []
    assert paddle_clip.compile(model).engine == "paddle"


@needs_extras
def test_each_file_is_written_when_asked_for(exported, tmp_path):
    model, _ = exported
    names = {"onnx": {"image.onnx", "text.onnx"}, "openvino": {"image.xml", "image.bin", "text.xml", "text.bin"}}
    for files, expected in names.items():
        paddle_clip.export(model, tmp_path / files, **{files: True})
        plain = {*PROGRAMS, "config.json"}
        assert set(os.listdir(tmp_path / files)) == plain | expected
    assert paddle_clip.Predictor(tmp_path / "onnx").engine == "paddle"
    # A Clamp follows each c_proj, the attention pool's too: it makes OpenVINO choose the faster product.
    c_projs = {"image": [name for name, _ in model.visual.named_parameters() if name.endswith("c_proj.weight")]}
    c_projs["text"] = [name for name, _ in model.transformer.named_parameters() if name.endswith("c_proj.weight")]
    for tower, names in c_projs.items():
        assert (tmp_path / "openvino" / f"{tower}.xml").read_text().count('type="Clamp"') == len(names)


@needs_extras
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="this system does not tell resident memory")
def test_openvino_keeps_no_weights_it_has_packed(folder):
    """Both files are mapped, and none of their pages is in memory until it is read again."""
    predictor = paddle_clip.Predictor(folder, engine="openvino")
    resident, mapping = {}, None
    with open("/proc/self/smaps") as file:
        for line in file:
            if line[0] in "0123456789abcdef":
                mapping = line.split()[-1]
            elif line.startswith("Rss:"):
                resident[mapping] = resident.get(mapping, 0) + int(line.split()[1])
    assert predictor.engine == "openvino"
    assert [resident[os.path.realpath(folder / f"{tower}.bin")] for tower in ("image", "text")] == [0, 0]


@needs_extras
def test_int8(exported, tmp_path):
    """Only the image encoder is quantised: its features stay near, and the features of texts stay the same."""
    pytest.importorskip("nncf", reason="NNCF is not installed")
    model, _ = exported
    images, tokens = images_and_texts(model, 40)
    paddle_clip.export(model, tmp_path / "int8", calibration=images[:32])
    assert "calibration.npy" not in os.listdir(tmp_path / "int8")
    found = [paddle_clip.Predictor(tmp_path / "int8", precision=precision) for precision in ("float32", "int8")]
    assert [predictor.engine for predictor in found] == ["openvino", "openvino"]
    assert np.array_equal(*(predictor.encode_text(tokens) for predictor in found))
    exact, quantised = (predictor.encode_image(images) for predictor in found)
    assert np.abs(quantised - exact).max() > 1e-3 * np.abs(exact).max()
    cosine = (exact * quantised).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(quantised, axis=-1)
    assert cosine.min() >= 0.98
    compiled = paddle_clip.compile(model, calibration=images[:32])
    assert np.array_equal(compiled.encode_image(images), quantised)


def test_int8_that_is_not_there(exported, tmp_path, monkeypatch):
    model, directory = exported
    with pytest.raises(FileNotFoundError, match="holds no int8 encoder: export the model again with calibration"):
        paddle_clip.Predictor(directory, precision="int8")
    with pytest.raises(FileNotFoundError, match="holds no files for OpenVINO"):  # the text encoder has no files
        engines._choose_engine(None, "int8", "cpu", directory, ["image.int8.xml", "image.int8.bin"])
    if EXTRAS:
        with pytest.raises(ValueError, match=r"images are \[2, 3, 8, 8\]; this model takes"):
            paddle_clip.compile(model, calibration=np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match="the precision is 'int4'; choose float32, bfloat16 or int8"):
        paddle_clip.Predictor(directory, precision="int4")
    if EXTRAS:
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else find(name))
        with pytest.raises(ImportError, match="nncf is not installed: pip install nncf openvino paddle2onnx"):
            paddle_clip.export(model, tmp_path / "new", calibration=images_and_texts(model, 1)[0])
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("engine", ["paddle", pytest.param("openvino", marks=needs_extras)])
def test_bfloat16(exported, engine):
    """Both encoders in bfloat16 where the processor has such products, and the reason where it has none."""
    model, directory = exported
    images, tokens = images_and_texts(model)
    for make in (
        lambda: paddle_clip.Predictor(directory, engine=engine, precision="bfloat16"),
        lambda: paddle_clip.compile(model, engine=engine, precision="bfloat16"),
    ):
        if engine == "paddle" and not deploy.PADDLE_3:
            with pytest.raises(ValueError, match=r"Paddle 2 computes no bfloat16 products: use Paddle 3"):
                make()
        elif paddle.base.core.supports_bfloat16_fast_performance():
            predictor, exact = make(), paddle_clip.Predictor(directory, engine=engine)
            for rounded, full in (
                (predictor.encode_image(images), exact.encode_image(images)),
                (predictor.encode_text(tokens), exact.encode_text(tokens)),
            ):
                assert (rounded != full).any()
                assert (unit(rounded) * unit(full)).sum(axis=-1).min() >= 0.999
        else:
            with pytest.raises(ValueError, match=r"computes no bfloat16 products.*precision='float32'"):
                make()


@pytest.mark.skipif(not deploy.PADDLE_3, reason="Paddle 2 computes no bfloat16 products")
@pytest.mark.skipif(not paddle.base.core.supports_bfloat16_fast_performance(), reason="nor does this processor")
def test_bfloat16_is_computed_on_the_cpu_where_paddle_has_a_gpu(exported, monkeypatch):
    monkeypatch.setattr(engines, "_current_device", lambda: "gpu:0")
    assert paddle_clip.Predictor(exported[1], precision="bfloat16").device == "cpu"


@needs_extras
def test_openvino_needs_no_paddle(exported, run, tmp_path):
    """An exported folder serves classification with neither Paddle nor its import."""
    _, directory = exported
    script = (
        "import sys; sys.modules['paddle'] = None; import numpy as np; from paddle_clip import Predictor, classify; "
        "predictor = Predictor(sys.argv[1]); side = predictor.image_resolution; "
        "pixels = predictor.preprocess.array(np.zeros([40, 30, 3], np.uint8)); assert pixels.shape == (3, side, side); "
        "print(predictor.engine, predictor.encode_image(pixels[None]).shape, type(predictor.logit_scale).__name__)"
    )
    done = run("-W", "ignore", "-c", script, directory)
    assert done.returncode == 0, done.stderr
    width = paddle_clip.Predictor(directory, engine="openvino").embed_dim
    assert done.stdout.split("\n")[0] == f"openvino (1, {width}) ndarray"
    script = script.replace("sys.modules['paddle'] = None; ", "") + "; assert 'paddle' not in sys.modules"
    assert (
        run("-W", "ignore", "-c", script.replace(", type(predictor.logit_scale).__name__", ""), directory).returncode
        == 0
    )


@needs_extras
def test_texts_import_no_paddle(run, tmp_path):
    """A photo is classified without Paddle, texts and all, where Paddle is installed too."""
    model, _ = paddle_clip.load("tiny")
    paddle_clip.export(model, tmp_path / "tiny", openvino=True)
    script = (
        "import sys; from paddle_clip import Predictor, classify, samples; predictor = Predictor(sys.argv[1]); "
        "print(classify(predictor, predictor.preprocess, [samples()[0]], ['a black cross', 'a red circle'])[0][0][0], "
        "type(predictor.tokenize('a cross')).__name__, 'paddle' in sys.modules)"
    )
    done = run("-W", "ignore", "-c", script, tmp_path / "tiny")
    assert done.stdout == "a black cross ndarray False\n", done.stderr


def test_no_export(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"paddle_clip.export\(model, directory\) makes one"):
        paddle_clip.Predictor(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is not what"):
        paddle_clip.Predictor(tmp_path)


def test_what_is_replaced(exported, folder, tmp_path):
    """An older export is replaced; a folder of anything else is not."""
    model = exported[0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        paddle_clip.export(model, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    (folder / "leftover").touch()
    paddle_clip.export(model, folder)
    assert not (folder / "leftover").exists()
    paddle_clip.Predictor(folder)


def test_a_link_to_a_folder_stays_one(exported, folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    (folder / "leftover").touch()
    paddle_clip.export(exported[0], link)
    assert link.is_symlink()
    assert not (folder / "leftover").exists()
    assert sorted(os.listdir(tmp_path)) == [folder.name, link.name]


def test_an_older_export_comes_back_if_it_cannot_be_replaced(exported, folder, tmp_path, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if target == str(folder) and not source.endswith(".old"):
            raise OSError("no more")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    before = sorted(os.listdir(folder))
    with pytest.raises(OSError, match="no more"):
        paddle_clip.export(exported[0], folder)
    assert (before, [folder.name]) == (sorted(os.listdir(folder)), os.listdir(tmp_path))
    paddle_clip.Predictor(folder)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_what_a_killed_export_left(exported, folder, tmp_path, monkeypatch, moment):
    """The next export removes it. Where only the hidden folder is whole, the error says so, and a failure keeps it."""
    partial, old = tmp_path / ".copy.partial", tmp_path / ".copy.old"
    if moment == "after":
        shutil.copytree(folder, old)
    else:
        partial.mkdir()
        (partial / "image.pdiparams").write_bytes(b"half")
    if moment == "between":
        folder.rename(old)
        with pytest.raises(FileNotFoundError, match=r"an export was killed: the one from before is .*\.copy\.old"):
            paddle_clip.Predictor(folder)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(paddle.jit, "save", failing)
        paddle_clip.export(exported[0], folder)
    assert os.listdir(tmp_path) == ["copy"]
    paddle_clip.Predictor(folder)
    paddle_clip.export(exported[0], folder)
    assert os.listdir(tmp_path) == ["copy"]


def test_one_export_at_a_time(exported, folder, tmp_path, monkeypatch):
    """The second is refused, and harms neither the first nor what is there."""
    save, refused = paddle.jit.save, []

    def second(*arguments):
        if not refused:
            with pytest.raises(CheckpointError, match=r"another process is writing .*copy; wait for it"):
                paddle_clip.export(exported[0], folder)
            refused.append(True)
        save(*arguments)

    monkeypatch.setattr(paddle.jit, "save", second)
    paddle_clip.export(exported[0], folder)
    assert refused and os.listdir(tmp_path) == ["copy"]
    paddle_clip.Predictor(folder)


@pytest.mark.parametrize("name", [".copy.partial", ".copy.old"])
def test_links_in_place_of_hidden_folders(exported, folder, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (tmp_path / name).symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises((CheckpointError, FileExistsError), match=r"is no folder|is not an empty folder"):
        paddle_clip.export(exported[0], folder)
    assert (tmp_path / "mine" / "thesis").exists()


def test_a_full_disk_is_named(exported, folder, tmp_path, monkeypatch):
    """Paddle and OpenVINO tell of it in their own words."""

    def fail(*arguments):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(paddle.jit, "save", fail)
    with pytest.raises(RuntimeError, match="iostream error"):
        paddle_clip.export(exported[0], folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=4096))
    with pytest.raises(OSError, match=r"No space left on device: '.*copy'"):
        paddle_clip.export(exported[0], folder)
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "the device is 'tpu'; choose cpu, gpu"),
        ("gpu:one", "the device is 'gpu:one'; choose cpu, gpu"),
        pytest.param(
            "gpu:0",
            "this build of Paddle has no CUDA",
            marks=pytest.mark.skipif(paddle.device.is_compiled_with_cuda(), reason="this build of Paddle has CUDA"),
        ),
    ],
)
def test_devices_there_are_not(exported, device, message):
    with pytest.raises(ValueError, match=message):
        paddle_clip.Predictor(exported[1], device=device)


def test_half_precision_is_refused_on_the_cpu(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="bfloat16 does not run on the CPU"):
        paddle_clip.Predictor(folder, device="cpu")


def test_a_failed_export_leaves_nothing(exported, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paddle.jit, "save", failing)
    before = sorted(os.listdir(folder)), sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        paddle_clip.export(exported[0], folder)
    assert before == (sorted(os.listdir(folder)), sorted(os.listdir(tmp_path)))


def test_float64_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model is in float64; export takes float32"):
        paddle_clip.export(build(VARIANTS["vit"]).to(dtype="float64"), tmp_path / "model")
    assert os.listdir(tmp_path) == []
