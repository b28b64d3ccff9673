"""Every format converts to the same tensors bit for bit, and the models agree with the library that made the file."""

import dataclasses
import os

import numpy as np
import paddle
import pytest
import torch

import paddle_clip
import parity
import reference
from paddle_clip import CheckpointError, presets
from paddle_clip.checkpoints import dialects, reading
from paddle_clip.checkpoints.conversion import check, convert
from paddle_clip.checkpoints.files import sha256
from paddle_clip.checkpoints.shapes import parameter_shapes
from variants import VARIANTS

PT2PADDLE, PADDLE2PT = os.path.join("convert", "pt2paddle.py"), os.path.join("convert", "paddle2pt.py")
# File, variant, the activation to ask for, the activation it has, and the name of its library's outputs.
FILES = [
    ("vit.pt", "vit", None, "quickgelu", None),
    ("vit_state_dict.pt", "vit", None, "quickgelu", None),
    ("legacy.pt", "vit", None, "quickgelu", None),
    ("training.pt", "vit", None, "quickgelu", None),
    ("resnet.pt", "resnet", None, "quickgelu", None),
    ("resnet_state_dict.pt", "resnet", None, "quickgelu", None),
    ("hugging_face/model.safetensors", "vit", None, "quickgelu", "hugging_face"),
    ("hugging_face_sharded/model.safetensors.index.json", "vit", None, "quickgelu", "hugging_face"),
    ("hugging_face_bin/pytorch_model.bin", "vit", "quickgelu", "quickgelu", "hugging_face"),
    ("paddleclip_vit.pdparams", "vit", None, "quickgelu", "paddleclip_vit"),
    ("paddleclip_resnet.pdparams", "resnet", None, "quickgelu", "paddleclip_resnet"),
    *(
        (f"open_clip_{variant}_{layout}_{activation}.pt", variant, activation, activation, "=")
        for variant in ("vit", "resnet")
        for layout in ("flat", "custom")
        for activation in ("quickgelu", "gelu")
    ),
]
ALL = pytest.mark.parametrize(
    ("file", "variant", "asked", "activation", "library"), FILES, ids=[row[0] for row in FILES]
)


@pytest.fixture(scope="module")
def libraries(library_files):
    """{name: array} of the libraries' outputs for their files, in float64."""
    with np.load(library_files / "libraries.npz") as first, np.load(library_files / "paddleclip.npz") as second:
        return {**first, **second}


@ALL
def test_same_tensors_and_outputs(
    library_files, arrays_of, libraries, tmp_path, file, variant, asked, activation, library
):
    expected = dialects.from_checkpoint(arrays_of(variant)).arrays
    for extension in (".pdparams", ".safetensors"):
        output = tmp_path / f"x{extension}"
        report = convert(library_files / file, output, activation=asked)
        assert report.config.activation == activation
        found = reading.read(output)
        assert found.metadata["activation"] == activation
        assert found.metadata["source_sha256"] == sha256(library_files / file)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name, strict=True)
    if library:
        library = file[:-3] if library == "=" else library
        inputs = parity.random_inputs(VARIANTS[variant])
        with paddle.no_grad():
            for path in (output, tmp_path / "x.pdparams"):
                model, _ = paddle_clip.load(path, "float64")
                image = model.encode_image(paddle.to_tensor(inputs["images"])).numpy()
                text = model.encode_text(paddle.to_tensor(inputs["tokens"])).numpy()
                assert parity.difference(image, libraries[f"{library}.image"])[1] <= 1e-10
                assert parity.difference(text, libraries[f"{library}.text"])[1] <= 1e-10


def test_the_activations_differ(libraries):
    """Otherwise the test above could not tell the activations apart."""
    for variant in ("vit", "resnet"):
        gelu, quick = (libraries[f"open_clip_{variant}_flat_{name}.text"] for name in ("gelu", "quickgelu"))
        assert parity.difference(gelu, quick)[1] > 1e-3


@pytest.mark.parametrize("file", ["hugging_face_bin/pytorch_model.bin", "open_clip_vit_custom_gelu.pt"])
def test_an_activation_nobody_told_is_not_guessed(library_files, run, tmp_path, file):
    done = run(PT2PADDLE, library_files / file, "-o", tmp_path / "x.pdparams")
    assert done.returncode == 1
    assert "give --activation quickgelu" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(CheckpointError, match="activation='gelu'"):
        paddle_clip.load(library_files / file)
    assert paddle_clip.load(library_files / file, activation="gelu")[0] is not None
    assert os.listdir(tmp_path) == []


def test_an_activation_assumed_from_openais_names_is_told(library_files, run, tmp_path):
    done = run(PT2PADDLE, library_files / "open_clip_vit_flat_gelu.pt", "-o", tmp_path / "x.pdparams")
    assert (
        "quickgelu (by OpenAI's names; a file that open_clip trained with GELU needs --activation gelu)" in done.stdout
    )


def test_an_open_clip_config_tells_the_activation(library_files, tmp_path):
    source = tmp_path / "open_clip_pytorch_model.bin"
    source.write_bytes((library_files / "open_clip_vit_flat_gelu.pt").read_bytes())
    for text, activation in (("{}", "gelu"), ('{"quick_gelu": true}', "quickgelu"), ('{"quick_gelu": false}', "gelu")):
        (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {text}}}')
        assert check(source)[0].config.activation == activation
        assert check(source, activation="gelu")[0].config.activation == "gelu"
    (tmp_path / "open_clip_config.json").write_text("not json")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json cannot be used"):
        check(source)
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {"head_width": 80}}}')
    with pytest.raises(CheckpointError, match="head_width is 80, expected a number that divides"):
        check(source)


def test_what_lies_beside_a_file_that_needs_nothing_is_not_read(files, tmp_path):
    for name in ("vit.pt", "vit_state_dict.pt"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    (tmp_path / "config.json").write_text("// not json")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": false}}')
    assert check(tmp_path / "vit.pt")[0].config.activation == "quickgelu"  # OpenAI's archives have this one
    assert check(tmp_path / "vit_state_dict.pt")[0].config.activation == "gelu"
    os.unlink(tmp_path / "open_clip_config.json")
    os.mkfifo(tmp_path / "open_clip_config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        check(tmp_path / "vit_state_dict.pt")


@pytest.mark.parametrize("width", [1280, 1408, 1664])
def test_widths_that_leave_a_doubt_about_the_heads_are_refused(width):
    config = dataclasses.replace(presets.preset("ViT-L/14").config, vision_width=width)
    shapes = parameter_shapes(config)
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    state = dict(dialects.to_openai(name, array) for name, array in state.items())
    with pytest.raises(CheckpointError, match="give them, such as heads=16"):
        dialects.from_checkpoint(state)


def test_loading_by_openais_names_alone_warns(library_files, recwarn):
    paddle_clip.load(library_files / "open_clip_vit_flat_gelu.pt", activation="gelu")
    paddle_clip.load(library_files / "vit.pt")
    assert not [warning for warning in recwarn if "activation" in str(warning.message)]
    with pytest.warns(UserWarning, match="trained with GELU needs"):
        paddle_clip.load(library_files / "open_clip_vit_flat_gelu.pt")


def test_a_hugging_face_config_of_another_model_is_refused(library_files, tmp_path):
    model = (library_files / "hugging_face" / "model.safetensors").read_bytes()
    config = (library_files / "hugging_face" / "config.json").read_text()
    (tmp_path / "model.safetensors").write_bytes(model)
    for old, new, message in (
        ('"quick_gelu"', '"gelu_new"', r"activations \['gelu_new'\]"),
        ('"num_attention_heads": 3', '"num_attention_heads": 7', "heads"),
        ('"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e-06', "epsilon"),
    ):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            check(tmp_path / "model.safetensors")


def test_projections_that_do_not_go_together_are_all_reported(library_files):
    state = dict(reading.read(library_files / "hugging_face" / "model.safetensors"))
    del state["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    name = "vision_model.encoder.layers.1.self_attn.v_proj.bias"
    state[name] = state[name][:-1]
    with pytest.raises(CheckpointError) as error:
        dialects.from_checkpoint(state, "x", "gelu")
    assert "2 missing: transformer.resblocks.0.attn.in_proj.weight [192, 576], " in str(error.value)
    assert "5 unexpected: transformer.resblocks.0.attn.in_proj.weight#q [192, 192], " in str(error.value)


def test_sharded_files_must_be_whole_and_at_home(library_files, tmp_path):
    for path in (library_files / "hugging_face_sharded").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="not in its folder"):
        check(index)
    index.write_text(text)
    (tmp_path / "model-00002-of-00008.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not beside it: model-00002-of-00008.safetensors. Download them"):
        check(index)
    (tmp_path / "model-00002-of-00008.safetensors").write_bytes(
        (tmp_path / "model-00003-of-00008.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="does not hold what the index says"):
        check(index)


def test_two_models_in_one_file_are_refused(library_files, tmp_path):
    state = torch.load(library_files / "vit_state_dict.pt")
    average = {name: tensor.clone() for name, tensor in state.items()}
    torch.save({"model": state, "ema": average}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"several models: ema\.\*, model\.\*"):
        check(tmp_path / "x.pt")
    torch.save({"model": state, "ema": state}, tmp_path / "x.pt")  # the same tensors twice are one model
    assert check(tmp_path / "x.pt")[0].ignored


def test_what_is_beside_the_model_is_told(library_files, run, tmp_path):
    done = run(PT2PADDLE, library_files / "training.pt", "-o", tmp_path / "x.pdparams")
    assert "tensors beside state_dict.module._orig_mod.* ignored" in done.stdout


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("dtype", ["float32", "keep"])
def test_the_round_trip_is_bit_exact(files, run, tmp_path, variant, dtype):
    """.pt -> .pdparams -> .pt, which OpenAI's build_model loads strictly."""
    assert run(PT2PADDLE, files / f"{variant}.pt", "-o", tmp_path / "x.pdparams", "--dtype", dtype).returncode == 0
    done = run(PADDLE2PT, tmp_path / "x.pdparams", "--dtype", "published" if dtype == "float32" else "keep")
    assert done.returncode == 0, done.stderr
    source = torch.jit.load(files / f"{variant}.pt").state_dict()
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    assert back.keys() == {name for name in source if not dialects.DROPPED.fullmatch(name)}
    for name, tensor in back.items():
        assert tensor.dtype == source[name].dtype, name
        assert torch.equal(tensor, source[name]), name
    model = reference.openai("model").build_model(dict(back))
    for name, tensor in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, source[name]), name


@pytest.mark.parametrize("row", presets.PRESETS, ids=lambda row: row.name)
def test_published_dtypes_are_openais(row):
    """The dtypes at full size are those that OpenAI's convert_weights makes."""
    code = reference.openai("model")
    with torch.device("meta"):
        model = code.CLIP(**reference.sizes(row.config))
    code.convert_weights(model)
    for name, tensor in model.state_dict().items():
        if not dialects.DROPPED.fullmatch(name):
            assert str(tensor.dtype) == f"torch.{dialects.published_dtype(name)}", name


def test_check_counts_and_writes_nothing(files, run, tmp_path):
    state = torch.load(files / "vit_state_dict.pt")
    state["visual.proj"][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    torch.save(state, tmp_path / "x.pt")
    done = run(PT2PADDLE, "--check", tmp_path / "x.pt")
    assert done.returncode == 0, done.stderr
    lines = {line[2:12].strip(): line[13:] for line in done.stdout.splitlines()[1:]}
    assert lines["NaN, inf"] == "1, 2"
    assert lines["dtypes"] == "43 float16, 31 float32"
    assert lines["format"] == "PyTorch state dict, OpenAI's names"
    assert lines["checksums"] == "none in the file"
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("vit.pt", []),
        ("vit.pt", ["--dtype", "bfloat16"]),
        ("hugging_face/model.safetensors", []),
        ("open_clip_resnet_custom_gelu.pt", ["--activation", "gelu"]),
    ],
)
def test_verify_prints_the_parity_table(library_files, run, tmp_path, file, arguments):
    done = run(PT2PADDLE, "--verify", library_files / file, "-o", tmp_path / "x.pdparams", *arguments)
    assert done.returncode == 0, done.stderr
    assert "max abs diff" in done.stdout
    assert "tensors equal PyTorch's" in done.stdout


def test_verify_without_torch_checks_the_checksums(files, run, tmp_path):
    block = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, 'convert'); "
    script = block + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run("-c", script, PT2PADDLE, "--verify", files / "vit.pt", "-o", tmp_path / "x.pdparams")
    assert done.returncode == 0, done.stderr
    assert "verified 74 tensors by their checksums" in done.stdout


def test_paddle2pt_does_not_replace_the_original(files, run, tmp_path):
    (tmp_path / "vit.pt").write_bytes((files / "vit.pt").read_bytes())
    assert run(PT2PADDLE, tmp_path / "vit.pt").returncode == 0
    done = run(PADDLE2PT, tmp_path / "vit.pdparams")
    assert done.returncode == 1
    assert "exists; name the output" in done.stderr
    assert (tmp_path / "vit.pt").read_bytes() == (files / "vit.pt").read_bytes()
    assert run(PADDLE2PT, tmp_path / "vit.pdparams", "-o", tmp_path / "back.pt").returncode == 0


def test_two_files_with_one_output_are_refused(files, run):
    done = run(PT2PADDLE, files / "vit.pt", files / "vit.safetensors")
    assert done.returncode == 2
    assert "one output" in done.stderr


def test_paddle2pt_refuses_other_outputs(files, run, tmp_path):
    done = run(PADDLE2PT, files / "vit.pt", "-o", tmp_path / "x.bin")
    assert done.returncode == 2
    done = run(PADDLE2PT, tmp_path / "none.pdparams")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
