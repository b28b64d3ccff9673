"""PyTorch and Paddle on identical inputs, stage by stage: the reference is OpenAI's code, every weight random."""

import json
import os
import re

import numpy as np
import paddle
import pytest
import torch
from conftest import DEVICES

import paddle_clip
import parity
import reference
from paddle_clip import convert, presets
from variants import OTHERS, VARIANTS

BOTH = pytest.mark.parametrize("variant", sorted(VARIANTS))
PARITY = os.path.join("convert", "parity.py")
# The published logits of the official files for a grey image and a text of ones (OpenAI's README and hub tests).
PUBLISHED = {"RN50": 18.1140, "RN101": 33.5211, "RN50x4": 29.5482, "ViT-B/32": 27.5936}


@pytest.fixture(scope="module")
def pairs(files, tmp_path_factory):
    """A function returning a variant's checkpoint and its conversion."""
    folder = tmp_path_factory.mktemp("converted")

    def pair(variant):
        converted = folder / f"{variant}.pdparams"
        convert(files / f"{variant}.pt", converted)
        return str(files / f"{variant}.pt"), str(converted)

    return pair


@BOTH
def test_float64_stage_by_stage(pairs, variant, device):
    config = VARIANTS[variant]
    names = parity.stages(config)
    inputs = parity.random_inputs(config)
    [(ours, theirs)] = parity.compare(*pairs(variant), parity.Run(inputs, "float64", names), device=device)
    assert ours.keys() == theirs.keys() == {*names, *parity.OUTPUTS}
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype == np.float64
        assert parity.difference(ours[name], array)[1] <= parity.FLOAT64_BOUND, name
    rows = theirs["text_features"]
    assert len(np.unique(rows.round(6), axis=0)) == len(rows)  # the texts differ, so a wrong row would show


@BOTH
def test_float32_rounds_like_pytorch(pairs, variant, device):
    config = VARIANTS[variant]
    inputs = parity.random_inputs(config, batch=8)
    runs = parity.Run(inputs, "float64"), parity.Run(inputs, "float32")
    (_, truth), (ours, theirs) = parity.compare(*pairs(variant), *runs, device=device)
    for name in parity.OUTPUTS:
        assert ours[name].dtype == np.float32
        assert parity.error_ratio([ours[name]], [theirs[name]], [truth[name]]) <= parity.FLOAT32_RATIO, name


@BOTH
@pytest.mark.parametrize("train", [False, True])
def test_gradients_of_every_parameter(pairs, variant, device, train):
    config = VARIANTS[variant]
    inputs = parity.random_inputs(config)
    run = parity.Run(inputs, "float64", gradients=".*", train=train)
    [(ours, theirs)] = parity.compare(*pairs(variant), run, device=device)
    names = {f"grad.{name}" for name, _ in presets.build(config).named_parameters()}
    assert names == {name for name in ours if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    worst, name = parity.gradient_difference(ours, theirs)
    assert worst <= parity.FLOAT64_BOUND, name


@pytest.mark.parametrize("variant", [*sorted(VARIANTS), "chinese_vit"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("where", DEVICES[1:])
def test_half_precision(files, variant, dtype, where):
    """On a GPU, features in half precision point where float32's point, and nothing overflows."""
    inputs = parity.random_inputs({**VARIANTS, **OTHERS}[variant])
    features = {}
    for name in ("float32", dtype):
        paddle.set_device(where)
        model, _ = paddle_clip.load(files / f"{variant}.pt", name)
        images, tokens = paddle.to_tensor(inputs["images"].astype(np.float32)), paddle.to_tensor(inputs["tokens"])
        with paddle.no_grad():
            outputs = model.encode_image(images), model.encode_text(tokens), model(images, tokens)[0]
        assert outputs[0].dtype == outputs[1].dtype == getattr(paddle, name)
        assert outputs[2].dtype == paddle.float32
        features[name] = [output.astype("float32").numpy() for output in outputs]
    for half, full in zip(features[dtype][:2], features["float32"][:2]):
        cosine = (half * full).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
        assert cosine.min() > 0.99
    assert np.isfinite(features[dtype][2]).all()


@BOTH
def test_the_command_prints_the_table(run, files, variant):
    done = run(PARITY, files / f"{variant}.pt", "--stages")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "Model",
        "Paddle",
        "PyTorch",
        "max abs diff",
        "max rel diff",
    ]
    labels = [line.split("|")[0].strip() for line in lines]
    for kind in ("ones", "random"):
        assert {f"{variant}.pt, {kind}, float64", f"{variant}.pt, {kind}, float32"} <= set(labels)
    assert set(parity.stages(VARIANTS[variant])) <= set(labels)
    equal = re.search(r"(\d+) of (\d+) tensors equal", done.stdout)
    assert equal[1] == equal[2]


def test_the_command_fails_past_its_bounds(run, files, tmp_path):
    """The command finds a converter that forgets a transpose, and a model that swaps ln_1 and ln_2."""
    for rules in (
        "[(theirs, ours, t and 'out_proj' not in theirs) for theirs, ours, t in dialects.OPENAI]",
        "[('{}.ln_1.{}', '{}.ln_2.{}', False), ('{}.ln_2.{}', '{}.ln_1.{}', False), *dialects.OPENAI]",
    ):
        done = run(
            "-c",
            "import sys; sys.path[:0] = ['convert']; import parity; from paddle_clip.checkpoints import dialects; "
            f"dialects.DIALECTS = [d._replace(rules={rules}) if d.rules else d for d in dialects.DIALECTS]; "
            f"sys.argv = ['parity.py', {str(files / 'vit.pt')!r}]; sys.exit(parity.main())",
        )
        assert done.returncode == 1
        assert "in float64 > 1e-10" in done.stderr
        assert "differ from PyTorch's" in done.stderr


def test_the_command_refuses_what_is_no_checkpoint(run, files, tmp_path):
    (tmp_path / "x.pt").write_text("no")
    for file, words in (("none.pt", "No such file"), ("x.pt", "not a checkpoint")):
        done = run(PARITY, tmp_path / file)
        assert done.returncode == 1
        assert re.fullmatch(rf"error: .*{words}.*\n", done.stderr)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_logits(name):
    folder = os.environ.get("PADDLE_CLIP_WEIGHTS")
    row = presets.preset(name)
    if not folder or not os.path.exists(os.path.join(folder, row.file)):
        pytest.skip(f"PADDLE_CLIP_WEIGHTS names no folder with the official {row.file}")
    model, preprocess = paddle_clip.load(os.path.join(folder, row.file))
    resolution = row.config.image_resolution
    with paddle.no_grad():
        logits, _ = model(paddle.ones([1, 3, resolution, resolution]) / 2, paddle.ones([1, 77], dtype="int64"))
        assert logits.item() == pytest.approx(PUBLISHED[name], abs=1e-3)
        picture = os.path.join(folder, "CLIP.png")
        if name == "ViT-B/32" and os.path.exists(picture):
            texts = paddle_clip.tokenize(["a diagram", "a dog", "a cat"])
            logits, _ = model(preprocess(picture).unsqueeze(0), texts)
            probabilities = paddle.nn.functional.softmax(logits, axis=-1).numpy()[0]
            np.testing.assert_allclose(probabilities, [0.9927937, 0.00421068, 0.00299572], atol=1e-4)


@pytest.mark.parametrize("row", presets.OPEN_CLIP, ids=lambda row: row.name)
def test_the_sizes_are_open_clips(row):
    """Its own code builds a model of these sizes from its own configuration, with as many parameters."""
    open_clip = reference.open_clip()
    path = os.path.join(os.path.dirname(open_clip.__file__), "model_configs", f"{row.name}.json")
    with open(path, encoding="utf-8") as file:
        sizes = json.load(file)
    with torch.device("meta"):
        model = open_clip.CLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"])
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    assert row.config.image_resolution == sizes["vision_cfg"]["image_size"]
    heads = (model.visual.transformer.resblocks[0].attn.num_heads, model.transformer.resblocks[0].attn.num_heads)
    assert heads == (row.config.vision_heads, row.config.transformer_heads)
