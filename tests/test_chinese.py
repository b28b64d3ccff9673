"""Chinese-CLIP: against cn_clip's own code and Hugging Face's, its files, its tokens, its pictures, its programs."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import unicodedata

import numpy as np
import paddle
import pytest
import torch
from PIL import Image
from transformers import ChineseCLIPConfig, ChineseCLIPModel

import paddle_clip
import parity
import reference
from paddle_clip import CheckpointError, Predictor, presets
from paddle_clip.checkpoints import dialects, reading
from paddle_clip.checkpoints.conversion import check, convert, save
from paddle_clip.checkpoints.writing import write
from paddle_clip.config import Preprocessing
from paddle_clip.deploy import PADDLE_3
from paddle_clip.extras import has, makes_openvino
from paddle_clip.wordpiece import BertTokenizer
from variants import OTHERS

KINDS = ("chinese_vit", "chinese_resnet")
BOTH = pytest.mark.parametrize("kind", KINDS)
OPENVINO = makes_openvino()  # Paddle 3 is tested with the extras, Paddle 2 without them
INT8 = OPENVINO and has("int8")
# One with the whole vocabulary, for texts.
SMALL = presets.CLIPConfig(32, 32, 1, 64, 16, 64, 1, 2, 52, 21128, text_tower="bert", text_positions=64)


def strings(count, seed=0):
    """Texts of all that occurs in Chinese captions, and of what does not."""
    source = random.Random(seed)
    ranges = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2CEB0), (0xF900, 0xFAFF), (0x20, 0x7E), (0xFF00, 0xFFEF)]
    ranges += [(0x1F300, 0x1F6FF), (0xC0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0xAC00, 0xD7A3), (0, 0x10FFFF)]
    words = ["a photo of", "unaffable", "iPhone12", "[UNK]", "##ing", "don't", "\t", "\u3000", "\u2028", "\x85", "\0"]

    def character():
        if source.random() < 0.2:
            return source.choice(words)
        return chr(source.randint(*source.choice(ranges)))

    for _ in range(count):
        text = "".join(character() for _ in range(source.choice([1, 3, 8, 20, 60])))
        yield text.encode("utf-8", "ignore").decode()
    yield from ("狗" * 1000, "x" * 200 + " " + "x" * 201, "", " ", "臺灣 繁體", "１２３ＡＢＣ", "ﬁ İ ǅ Ⅷ")


@pytest.fixture(scope="module")
def theirs():
    """cn_clip's tokenizer."""
    return reference.cn_clip("bert_tokenizer").FullTokenizer()


@pytest.fixture(scope="module")
def small():
    paddle.seed(0)
    model = presets.build(SMALL)
    model.eval()
    return model


# --------------------------------------------------------------------------------------------------------------- parity


@BOTH
def test_each_stage_is_cn_clips(files, tmp_path, kind):
    config, converted = OTHERS[kind], tmp_path / "x.pdparams"
    report = convert(files / f"{kind}.pt", converted)
    assert report.config == config
    assert report.preprocessing == Preprocessing(resize_mode="squash")
    names = parity.stages(config)
    run = parity.Run(parity.random_inputs(config), "float64", names, gradients=".*")
    [(ours, truth)] = parity.compare(str(files / f"{kind}.pt"), str(converted), run)
    gradients = {f"grad.{name}" for name, _ in presets.build(config).named_parameters()}
    assert ours.keys() == truth.keys() == {*names, *parity.OUTPUTS, *gradients}
    worst, name = parity.gradient_difference(ours, truth)
    assert worst <= parity.FLOAT64_BOUND, name
    for name in (*names, *parity.OUTPUTS):
        assert parity.difference(ours[name], truth[name])[1] <= parity.FLOAT64_BOUND, name
    assert len(np.unique(truth["text_features"].round(6), axis=0)) == 4


def test_other_heads_and_mlps_are_open_clips(files, tmp_path):
    convert(files / "wide.pt", tmp_path / "x.pdparams", activation="gelu", heads=5)
    run = parity.Run(parity.random_inputs(OTHERS["wide"]), "float64")
    [(ours, truth)] = parity.compare(str(files / "wide.pt"), str(tmp_path / "x.pdparams"), run)
    for name in parity.OUTPUTS:
        assert parity.difference(ours[name], truth[name])[1] <= parity.FLOAT64_BOUND, name


def test_parity_measures_such_files(files, capsys):
    assert parity.measure(str(files / "chinese_vit.pt"), gradients=True) == []
    printed = capsys.readouterr().out
    assert "87 of 87 tensors are bit for bit the original's, and the publisher's code" in printed
    found = re.findall(r"chinese_vit.pt, (image|text) tower, (\d+) gradients", printed)
    assert [tower for tower, _ in found] == ["image", "text"]
    assert sum(int(count) for _, count in found) == 87


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """Hugging Face's model and its folder."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "intermediate_size": 96, "vocab_size": 150, "max_position_embeddings": 60}
    vision = {**size, "intermediate_size": 256, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model, folder = ChineseCLIPModel(config).eval(), tmp_path_factory.mktemp("chinese")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    described = {"image_processor_type": "ChineseCLIPImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**described, "do_center_crop": False, "resample": 3}))
    return model.double(), folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None}, None),
        ({"tokenizer_class": "ChineseCLIPTokenizer"}, None),
        ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, "do_lower_case is False"),
        ({"tokenizer_class": "CLIPTokenizer"}, "tokenizer_class is '?CLIPTokenizer"),
    ],
)
def test_the_settings_of_a_tokenizer(hugging_face, tmp_path, settings, named):
    folder = shutil.copytree(hugging_face[1], tmp_path / "x")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=named) if named else contextlib.nullcontext():
        check(folder)


def test_hugging_faces_model_computes_the_same(hugging_face):
    theirs, folder = hugging_face
    model, preprocess = paddle_clip.load(folder, "float64")
    assert model.preprocessing == Preprocessing(resize_mode="squash")
    assert preprocess.resize_mode == "squash"
    assert (model.config.context_length, model.config.text_positions) == (52, 60)
    random = np.random.default_rng(0)
    images, tokens = random.normal(size=[3, 3, 32, 32]), random.integers(1, 150, [3, 20])
    tokens[1, 7:] = tokens[2, 3:] = 0
    mask = torch.from_numpy((tokens != 0).astype(np.int64))
    with torch.no_grad(), paddle.no_grad():
        text = theirs.text_model(torch.from_numpy(tokens), attention_mask=mask, output_hidden_states=True)
        expected = theirs.text_projection(text.last_hidden_state[:, 0]).numpy()
        ours = model.encode_text(paddle.to_tensor(tokens))
        assert np.abs(ours.numpy() - expected).max() < 1e-12 * np.abs(expected).max()
        for state, other in zip(model.hidden_states(paddle.to_tensor(tokens)), text.hidden_states):
            seen = tokens != 0  # what padding is made of, nobody reads
            assert np.abs(state.numpy() - other.numpy())[seen].max() < 1e-12 * np.abs(other.numpy()).max()
        expected = theirs.visual_projection(theirs.vision_model(torch.from_numpy(images)).pooler_output).numpy()
        ours = model.encode_image(paddle.to_tensor(images)).numpy()
        assert np.abs(ours - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("section", "settings", "named"),
    [
        ("", {"model_type": "clip"}, "model_type is clip"),
        ("text_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ("text_config", {"hidden_act": "relu"}, "hidden_act is relu"),
        ("text_config", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("text_config", {"num_attention_heads": 5}, "num_attention_heads is 5"),
        ("vision_config", {"hidden_act": "silu"}, r"activations \['silu'\]"),
    ],
)
def test_settings_that_are_not_computed_are_refused(hugging_face, tmp_path, section, settings, named):
    folder = hugging_face[1]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (content[section] if section else content).update(settings)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named):
        check(tmp_path)


@pytest.mark.parametrize("form", ["cn_clip", "Hugging Face"])
def test_what_lies_beside_a_file_is_honoured(files, tmp_path, form):
    """The published repositories hold cn_clip's file beside Hugging Face's settings."""
    config = OTHERS["chinese_vit"]
    name = "x.pt" if form == "cn_clip" else "model.safetensors"
    if form == "cn_clip":
        (tmp_path / name).write_bytes((files / "chinese_vit.pt").read_bytes())
    else:
        write(tmp_path / name, as_hugging_face(files), lambda name: "keep", lambda checksums: {})
    text = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_hidden_layers": 3}
    text.update(vocab_size=150, max_position_embeddings=60)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision.update(image_size=48, patch_size=16, hidden_act="gelu")
    described = {"model_type": "chinese_clip", "projection_dim": 64, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(described))
    pictures = {"image_mean": [0.5] * 3, "size": {"height": 48, "width": 48}, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    report, _ = check(tmp_path / name)
    heads = {"transformer_heads": 6, "vision_head_width": 32, "activation": "gelu"}
    assert report.config == dataclasses.replace(config, **heads)
    assert report.preprocessing == Preprocessing(mean=(0.5, 0.5, 0.5), resize_mode="squash")
    text["layer_norm_eps"] = 1e-5
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="layer_norm_eps is 1e-05, expected 1e-12"):
        check(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------- files


def arrays_of(files, kind):
    """{our name: array} of a file."""
    found = dialects.from_checkpoint(reading.read(files / f"{kind}.pt"))
    return {name: np.array(array) for name, array in found.arrays.items()}


def as_hugging_face(files):
    """The names and layouts of Hugging Face's ChineseCLIPModel."""
    state = torch.load(files / "chinese_vit.pt", weights_only=True)["state_dict"]
    pairs = [
        ("bert.", "text_model."),
        ("text_projection", "text_projection.weight"),
        ("visual.proj", "visual_projection.weight"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("visual.transformer.resblocks", "vision_model.encoder.layers"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ]
    found = {}
    for name, tensor in state.items():
        name, array = name.removeprefix("module."), tensor.numpy()
        for ours, their in pairs:
            name = name.replace(ours, their)
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", np.split(array, 3)):
                found[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            found[name] = array.T if name.endswith("projection.weight") else array
    return found


@BOTH
@pytest.mark.parametrize("extension", [".pt", ".pdparams", ".safetensors"])
def test_there_and_back(files, tmp_path, kind, extension):
    expected = arrays_of(files, kind)
    convert(files / f"{kind}.pt", tmp_path / f"x{extension}")
    convert(tmp_path / f"x{extension}", tmp_path / "back.pt")
    found = dialects.from_checkpoint(reading.read(tmp_path / "back.pt"))
    assert found.config == OTHERS[kind]
    assert found.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), array, strict=True)
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    reference.build(OTHERS[kind]).load_state_dict(content["state_dict"], strict=kind == "chinese_vit")  # counters lack


def test_a_text_tower_alone(files, tmp_path):
    """Of cn_clip's names and layout, and of ours, which differ in the layout alone."""
    whole, _ = paddle_clip.load(files / "chinese_vit.pt")
    tokens = paddle.to_tensor(np.random.default_rng(0).integers(1, 150, [2, 9]))
    text = {n: a for n, a in arrays_of(files, "chinese_vit").items() if n.startswith(("bert.", "text_"))}
    paddle.save({name: paddle.to_tensor(array) for name, array in text.items()}, str(tmp_path / "ours.pdparams"))
    state = torch.load(files / "chinese_vit.pt", weights_only=True)["state_dict"]
    torch.save({n: t for n, t in state.items() if ".bert." in n or "text_" in n}, tmp_path / "theirs.pt")
    for name in ("ours.pdparams", "theirs.pt"):
        with pytest.warns(UserWarning, match="text tower alone"):
            model, _ = paddle_clip.load(tmp_path / name)
        np.testing.assert_array_equal(model.encode_text(tokens).numpy(), whole.encode_text(tokens).numpy())


def as_flash_attention(state):
    """cn_clip's names of a model trained with flash attention (its `convert_state_dict`)."""
    return reference.cn_clip("model").convert_state_dict(dict(state))


def as_paddlenlp(arrays):
    """PaddleNLP's names, of its transformers/chineseclip/modeling.py and BertModel, whose layers are Paddle's."""
    pairs = [
        ("bert.encoder.layer.", "text_model.encoder.layers."),
        ("attention.self.query", "self_attn.q_proj"),
        ("attention.self.key", "self_attn.k_proj"),
        ("attention.self.value", "self_attn.v_proj"),
        ("attention.output.dense", "self_attn.out_proj"),
        ("attention.output.LayerNorm", "norm1"),
        ("output.LayerNorm", "norm2"),
        ("intermediate.dense", "linear1"),
        ("output.dense", "linear2"),
        ("bert.embeddings.LayerNorm", "text_model.embeddings.layer_norm"),
        ("bert.embeddings", "text_model.embeddings"),
        ("visual.positional_embedding", "vision_model.positional_embedding.weight"),
        ("visual.proj", "vision_projection"),
        ("visual.transformer.resblocks.", "vision_model.transformer.layers."),
        ("visual.", "vision_model."),
        (".attn.out_proj", ".self_attn.out_proj"),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("mlp.c_fc", "linear1"),
        ("mlp.c_proj", "linear2"),
    ]
    found = {}
    for name, array in arrays.items():
        for ours, their in pairs:
            name = name.replace(ours, their)
        if ".attn.in_proj." in name:
            for letter, part in zip("qkv", np.split(array, 3, axis=-1)):
                found[name.replace("attn.in_proj", f"self_attn.{letter}_proj")] = part
        else:
            found[name] = array.reshape(1) if name == "logit_scale" else array
    return found


def test_files_of_other_programs(files, tmp_path):
    expected = arrays_of(files, "chinese_vit")
    state = torch.load(files / "chinese_vit.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": as_flash_attention(state)}, tmp_path / "flash.pt")
    pooler = {"module.bert.pooler.dense.weight": torch.ones(192, 192), "module.bert.pooler.dense.bias": torch.ones(192)}
    torch.save({"state_dict": {**state, **pooler}}, tmp_path / "pooler.pt")
    write(tmp_path / "paddlenlp.pdparams", as_paddlenlp(expected), lambda name: "keep", lambda checksums: {})
    kinds = {"flash.pt": "Chinese-CLIP", "pooler.pt": "Chinese-CLIP", "paddlenlp.pdparams": "PaddleNLP"}
    for name, kind in kinds.items():
        found = dialects.from_checkpoint(reading.read(tmp_path / name), name, "quickgelu")
        assert (found.dialect, found.config) == (kind, OTHERS["chinese_vit"])
        assert found.preprocessing.resize_mode == "squash"
        for tensor, array in expected.items():
            np.testing.assert_array_equal(np.asarray(found.arrays[tensor]), array, err_msg=tensor)


def test_what_does_not_fit_is_told(files, tmp_path):
    state = torch.load(files / "chinese_vit.pt", weights_only=True)["state_dict"]
    for change, named in (
        ({"module.bert.encoder.layer.0.output.dense.bias": None}, r"1 missing: bert\.encoder\.layer\.0\.output\.dense"),
        ({"module.bert.embeddings.token_type_embeddings.weight": torch.ones(3, 192)}, "token_type_embeddings"),
        ({"module.cls.predictions.bias": torch.ones(150)}, r"1 unexpected: cls\.predictions\.bias"),
        ({"module.text_projection": None}, "text_projection is missing"),
    ):
        torch.save({n: t for n, t in {**state, **change}.items() if t is not None}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=named):
            check(tmp_path / "x.pt")


@pytest.mark.parametrize("row", presets.CHINESE, ids=lambda row: row.name)
def test_the_sizes_are_cn_clips(row):
    """Its own code builds models of these sizes from its own configurations, with as many parameters."""
    folder = str(reference.located("cn-clip", "cn_clip", "cn-clip"))
    texts = {768: "RoBERTa-wwm-ext-base-chinese", 1024: "RoBERTa-wwm-ext-large-chinese"}
    text = "RBT3-chinese" if row.name == "clip_cn_rn50" else texts[row.config.transformer_width]
    images = {"vit-b-16": "ViT-B-16", "vit-l-14": "ViT-L-14", "vit-l-14-336": "ViT-L-14-336", "vit-h-14": "ViT-H-14"}
    sizes = {}
    for name in (images.get(row.name[len("clip_cn_") :], "RN50"), text):
        with open(os.path.join(folder, "clip", "model_configs", f"{name}.json"), encoding="utf-8") as file:
            sizes.update(json.load(file))
    if isinstance(sizes["vision_layers"], str):
        sizes["vision_layers"] = json.loads(sizes["vision_layers"])
    with torch.device("meta"):
        model = reference.cn_clip("model").CLIP(**sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    assert row.config.image_resolution == sizes["image_resolution"]


# --------------------------------------------------------------------------------------------------------------- texts


def test_tokens_are_cn_clips(theirs, small):
    ours = BertTokenizer()
    texts = list(strings(10_000))
    assert any(unicodedata.category(letter) == "Mn" for text in texts for letter in text)
    for text in texts:
        assert ours.encode(text) == theirs.convert_tokens_to_ids(theirs.tokenize(text)), ascii(text)
    texts = texts[-500:]
    rows = small.tokenize(texts, truncate=True).numpy()
    assert (rows.shape, rows.dtype) == ((500, 52), np.int64)
    for row, text in zip(rows, texts):
        ids = theirs.convert_tokens_to_ids(theirs.tokenize(text))[:50]
        assert row[: len(ids) + 2].tolist() == [101, *ids, 102]
        assert not row[len(ids) + 2 :].any()


def test_a_model_has_the_tokenizer_of_its_texts(small):
    assert small.tokenize("狗")[0, :3].tolist() == [101, 4318, 102]
    english = paddle_clip.load("tiny")[0]
    np.testing.assert_array_equal(english.tokenize(["a dog"]).numpy(), paddle_clip.tokenize(["a dog"]).numpy())
    with pytest.raises(RuntimeError, match=r"102 tokens long, .* the context length is 52: .*truncate=True"):
        small.tokenize("狗" * 100)


def test_tokens_of_another_model_are_told(small):
    with pytest.raises(ValueError, match=r"model\.tokenize\(texts"):
        small.encode_text(paddle_clip.tokenize(["a dog"]))
    with pytest.raises(ValueError, match=r"Chinese-CLIP's, .*model\.tokenize\(texts\)"):
        paddle_clip.load("tiny")[0].encode_text(small.tokenize(["狗", "一只猫"]))


def test_padding_changes_nothing(small):
    texts = ["狗", "一只在草地上奔跑的狗", "a photo of a dog"]
    tokens = small.tokenize(texts)
    together = small.encode_text(tokens).numpy()
    np.testing.assert_allclose(small.encode_text(tokens, trim=False).numpy(), together, rtol=0, atol=1e-6)
    for row, text in zip(together, texts):
        np.testing.assert_allclose(small.encode_text(small.tokenize(text))[0].numpy(), row, rtol=0, atol=1e-6)
    assert small.encode_text(tokens[:0]).shape == [0, 32]


# ------------------------------------------------------------------------------------------------ pictures and programs


def test_pictures_are_squashed_as_cn_clip_does(small, tmp_path):
    save(small, tmp_path / "x.pdparams")
    _, preprocess = paddle_clip.load(tmp_path / "x.pdparams")
    for size in ((70, 33), (20, 90), (32, 32)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
        mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
        expected = (expected - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(preprocess(picture).numpy(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def programs(small, tmp_path_factory):
    """The folder of an export with all that the installed packages can write."""
    folder = tmp_path_factory.mktemp("programs") / "export"
    calibration = np.random.default_rng(1).normal(size=[8, 3, 32, 32]) if INT8 else None
    paddle_clip.export(small, folder, openvino=OPENVINO, calibration=calibration)
    return folder


# The largest difference of images' and texts' features, relative to the largest number. 3e-7 was measured, in bfloat16
# 8e-3, and of images in int8 5e-2.
PRECISIONS = {
    ("paddle", "float32"): (1e-5, 1e-5),
    ("openvino", "float32"): (1e-5, 1e-5),
    ("paddle", "bfloat16"): (2e-2, 2e-2),
    ("openvino", "bfloat16"): (2e-2, 2e-2),
    ("openvino", "int8"): (1e-1, 1e-5),
}


@pytest.mark.parametrize(("engine", "precision"), PRECISIONS)
def test_programs_compute_what_the_layers_do(small, programs, engine, precision):
    if (engine == "openvino" and not OPENVINO) or (precision == "int8" and not INT8):
        pytest.skip("OpenVINO or NNCF is not installed, or Paddle is 2")
    if precision == "bfloat16" and not (PADDLE_3 and paddle.base.core.supports_bfloat16_fast_performance()):
        pytest.skip("the processor has no bfloat16 products, or Paddle is 2")
    predictor = Predictor(programs, engine=engine, precision=precision)
    of_images, of_texts = PRECISIONS[engine, precision]
    texts = ["狗", "一只在草地上奔跑的狗", "猫", "a photo of a dog", "雪" * 50]
    tokens = small.tokenize(texts).numpy()
    np.testing.assert_array_equal(np.asarray(predictor.tokenize(texts)), tokens)
    assert predictor.preprocess.resize_mode == "squash"
    expected = small.encode_text(paddle.to_tensor(tokens)).numpy()
    for trim in (True, False):
        found = predictor.encode_text(tokens, trim=trim)
        assert np.abs(found - expected).max() < of_texts * np.abs(expected).max()
        assert np.abs(predictor.encode_text(tokens[:1], trim=trim) - found[:1]).max() < of_texts * np.abs(found).max()
    images = np.random.default_rng(0).normal(size=[2, 3, 32, 32]).astype(np.float32)
    expected = small.encode_image(paddle.to_tensor(images)).numpy()
    assert np.abs(predictor.encode_image(images) - expected).max() < of_images * np.abs(expected).max()
    for ours, theirs in zip(predictor(images, tokens), small(paddle.to_tensor(images), paddle.to_tensor(tokens))):
        assert np.abs(ours - theirs.numpy()).max() < 10 * of_images * np.abs(theirs.numpy()).max()


def test_texts_are_cut_to_their_length(small, programs, monkeypatch):
    """To the longest of a batch; neither a [SEP] nor padding within a text ends it."""
    tokens = small.tokenize(["狗", "一只在草地上奔跑的狗", "草地上的猫"]).numpy()
    tokens[0, 4:6] = [0, 4318]  # [CLS] 狗 [SEP] 0 0 狗
    lengths = (1 + (tokens != 0) * np.arange(52)).max(axis=1)
    assert lengths.tolist() == [6, 12, 7]
    shapes = []
    hook = small.bert.embeddings.register_forward_pre_hook(lambda _layer, inputs: shapes.append(inputs[0].shape))
    expected = small.encode_text(paddle.to_tensor(tokens)).numpy()
    hook.remove()
    assert shapes == [[3, 12]]
    predictor = Predictor(programs, engine="paddle")
    run = predictor._run
    monkeypatch.setattr(predictor, "_run", lambda tower, array: shapes.append(array.shape) or run(tower, array))
    monkeypatch.setattr(predictor, "_tokens_at_once", 6)
    found = predictor.encode_text(tokens)
    assert shapes[1:] == [(1, 12), (1, 7), (1, 6)]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_everything_that_takes_texts_takes_chinese(small, tmp_path, run):
    save(small, tmp_path / "x.pdparams")
    model, preprocess = paddle_clip.load(tmp_path / "x.pdparams")
    pictures = paddle_clip.samples()
    assert {label for label, _ in paddle_clip.classify(model, preprocess, pictures[0], ["狗", "猫"])} == {"狗", "猫"}
    paddle_clip.embed(model, preprocess, pictures, tmp_path / "x.npy", progress=False)
    features, paths = paddle_clip.load_features(tmp_path / "x.npy")[:2]
    assert len(paddle_clip.search(model, preprocess, features, paths, "红色的圆", top_k=1)) == 1
    pairs = [(path, "一张照片") for path in pictures]
    paddle_clip.finetune(model, pairs, preprocess=preprocess, batch_size=4)
    save(model, tmp_path / "y.pdparams")
    assert isinstance(paddle_clip.load(tmp_path / "y.pdparams")[0], paddle_clip.ChineseCLIP)
    done = run("-m", "paddle_clip", "classify", pictures[0], "--model", tmp_path / "x.pdparams", "--labels", "狗", "猫")
    assert done.returncode == 0, done.stderr
    assert "狗" in done.stdout


def test_prompts_in_chinese():
    """ImageNet's, as cn_clip's evaluation has them."""
    path = reference.located("cn-clip", "cn_clip/eval/imagenet_zeroshot_templates.py", "cn-clip")
    spec = importlib.util.spec_from_file_location("cn_clip_templates", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    classes, templates = paddle_clip.prompts("imagenet", language="zh")
    assert classes == theirs.imagenet_classnames
    assert templates == [template("{}") for template in theirs.openai_imagenet_template]
    assert len(classes) == len(paddle_clip.prompts("ImageNet")[0]) == 1000
    with pytest.raises(ValueError, match="no prompts for 'CIFAR10'; available: ImageNet"):
        paddle_clip.prompts("CIFAR10", language="zh")
    with pytest.raises(ValueError, match="language is 'fr'; choose one of en, zh"):
        paddle_clip.available_prompts("fr")


def test_templates_are_in_the_models_language(run):
    model, preprocess = paddle_clip.load("tiny_cn")
    picture, labels = paddle_clip.samples()[6], ["红色的圆形", "红色的正方形"]
    default = paddle_clip.classify(model, preprocess, picture, labels)
    assert default == paddle_clip.classify(model, preprocess, picture, labels, "一张{}的照片")
    assert default != paddle_clip.classify(model, preprocess, picture, labels, "a photo of a {}.")
    ensemble = paddle_clip.zero_shot_classifier(model, labels).numpy()
    _, templates = paddle_clip.prompts("ImageNet", language="zh")
    np.testing.assert_array_equal(ensemble, paddle_clip.zero_shot_classifier(model, labels, templates).numpy())
    done = run("-m", "paddle_clip", "classify", picture, "--model", "tiny_cn", "--labels", *labels, "--json")
    (found,) = json.loads(done.stdout)
    for shown, expected in zip(found["labels"], default):
        assert shown["label"] == expected.label
        assert shown["probability"] == pytest.approx(expected.probability, abs=1e-5)
