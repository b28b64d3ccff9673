"""What files say of a model beside its tensors: honoured, refused or known to be harmless; and folders of models."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import warnings

import numpy as np
import paddle
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig as HuggingFaceConfig
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import paddle_clip
from paddle_clip import CheckpointError, Predictor, image_transform, presets
from paddle_clip.checkpoints import dialects
from paddle_clip.checkpoints import settings as room
from paddle_clip.checkpoints.conversion import check, convert, save
from paddle_clip.checkpoints.shapes import parameter_shapes
from paddle_clip.checkpoints.writing import write
from paddle_clip.config import Preprocessing

SMALL = presets.CLIPConfig(32, 32, 2, 64, 16, 64, 1, 2, 77, 602)
LAION = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
SQUASHED = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash")
VISION_CFG = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT_CFG = {"context_length": 77, "vocab_size": 602, "width": 64, "heads": 1, "layers": 2}
ADDED = [598, 320, 600, 7, 9, 599]  # token 600 was added to a vocabulary whose end-of-text is 599
RELATIVE = 1e-5  # float32 features of a model of two layers; 5e-7 measured


def weights(seed=0):
    """A random state dict in OpenAI's names and layouts."""
    random, found = np.random.default_rng(seed), {}
    for name, shape in parameter_shapes(SMALL).items():
        theirs, array = dialects.to_openai(name, random.normal(0, 0.1, shape).astype(np.float32))
        found[theirs] = np.array(array, order="C")
    return found


def put(path, arrays, dtype="keep"):
    """Writes tensors as another program would: without our metadata."""
    temporary = path.with_suffix(".pt" if path.suffix == ".bin" else path.suffix)
    write(temporary, arrays, lambda name: dtype, lambda checksums: {})
    os.replace(temporary, path)


def put_json(path, **content):
    path.write_text(json.dumps(content))


def open_clip_folder(folder, vision=(), text=(), preprocess=LAION, **model):
    folder.mkdir(exist_ok=True)
    put(folder / "open_clip_model.safetensors", weights())
    model = {
        "embed_dim": 32,
        "vision_cfg": {**VISION_CFG, **dict(vision)},
        "text_cfg": {**TEXT_CFG, **dict(text)},
        **model,
    }
    put_json(folder / "open_clip_config.json", model_cfg=model, preprocess_cfg=preprocess)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Hugging Face's model and its folder."""
    size = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**size, "vocab_size": 602, "eos_token_id": 599, "bos_token_id": 598, "pad_token_id": 0}
    torch.manual_seed(0)
    config = HuggingFaceConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=32
    )
    model, folder = CLIPModel(config).eval(), tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of Hugging Face's folder."""
    return shutil.copytree(theirs[1], tmp_path / "hf")


def change(folder, file="config.json", section="", **settings):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    (content[section] if section else content).update(settings)
    path.write_text(json.dumps(content))


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(image, mean, std):
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    return (pixels - np.array(mean, np.float32)[:, None, None]) / np.array(std, np.float32)[:, None, None]


# ------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_modes(interpolation):
    """By PIL's own operations: open_clip's transform takes torchvision."""
    resample = Image.Resampling[interpolation.upper()]
    image, mean, std = picture(80, 40), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    squashed = image.resize((32, 32), resample)
    cropped = image.resize((64, 32), resample).crop((16, 0, 48, 32))
    padded = Image.new("RGB", (32, 32), (9, 9, 9))
    padded.paste(image.resize((32, 16), resample), (0, 8))
    for mode, expected in (("squash", squashed), ("shortest", cropped), ("longest", padded)):
        found = image_transform(32, mean, std, interpolation, mode, 9).array(image)
        np.testing.assert_array_equal(found, normalised(expected, mean, std), err_msg=mode, strict=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"interpolation": "nearest"},
        {"resize_mode": "fit"},
        {"mean": (0.5,)},
        {"mean": 0.5},
        {"std": (1, 1, 1, 1)},
        {"std": (1, 0, 1)},
        {"std": (1, 1, float("nan"))},
        {"resolution": -1},
        {"resolution": 32.0},
        {"resolution": "32"},
        {"resolution": (32, 32)},
        {"resolution": None},
    ],
)
def test_unknown_preprocessing_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        image_transform(**{"resolution": 32, **wrong})


# mlfoundations/open_clip#204: LAION-2B's ViT-L/14. huggingface/transformers#39821 and mlfoundations/open_clip#579:
# MetaCLIP 2 and CLIPA squash.
def test_open_clips_preprocessing_goes_along(tmp_path):
    source = open_clip_folder(tmp_path / "source")
    image = picture(64, 40)
    expected = normalised(image.resize((32, 32), Image.Resampling.BILINEAR), [0.5] * 3, [0.5] * 3)
    model, preprocess = paddle_clip.load(source)
    np.testing.assert_array_equal(preprocess(image).numpy(), expected)
    for extension in (".pdparams", ".safetensors", ".pt"):
        (tmp_path / extension).mkdir()
        converted, saved = (tmp_path / extension / f"{name}{extension}" for name in ("converted", "saved"))
        assert convert(source, converted).preprocessing == SQUASHED
        save(model, saved)
        for path in (converted, saved):
            np.testing.assert_array_equal(paddle_clip.load(path)[1](image).numpy(), expected)
    paddle_clip.export(model, tmp_path / "export")
    np.testing.assert_array_equal(Predictor(tmp_path / "export").preprocess(image).numpy(), expected)


def test_openais_preprocessing_leaves_converted_files_as_they_were(tmp_path):
    put(tmp_path / "source.safetensors", weights())
    convert(tmp_path / "source.safetensors", tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"].keys() == {"format", "activation", "source", "source_sha256", "crc32"}


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"resample": 2},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"height": 32, "width": 32}, "resample": 2},
        {"do_normalize": False},
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_hugging_faces_preprocessing(folder, file, settings):
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **settings}
    processor = CLIPImageProcessorPil(**settings)
    processor.save_pretrained(folder)
    if file == "processor_config.json":  # of transformers 5
        put_json(folder / file, image_processor=json.loads((folder / "preprocessor_config.json").read_text()))
        os.unlink(folder / "preprocessor_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, _ = check(folder)
    assert report.preprocessing != Preprocessing()
    preprocess = image_transform(32, *report.preprocessing)
    # Where the long side exceeds the short one by an odd number, Hugging Face crops one pixel beside OpenAI.
    for image in (picture(72, 36), picture(36, 72)):
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess.array(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor", "do_convert_rgb": True},
        {"size": {"shortest_edge": 32, "longest_edge": None}, "crop_size": None, "rescale_factor": 0.00392156862745098},
    ],
)
def test_the_forms_of_openais_preprocessing(folder, settings):
    put_json(folder / "preprocessor_config.json", **settings)
    assert check(folder)[0].preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"resample": 0}, "resample is 0"),
        ({"size": 40}, "size is 40"),
        ({"size": {"longest_edge": 32}}, "size"),
        ({"crop_size": {"height": 32, "width": 48}}, "crop_size"),
        ({"do_center_crop": False}, "size"),
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_other_preprocessing_is_refused(folder, settings, named):
    put_json(folder / "preprocessor_config.json", **{"size": 32, "crop_size": 32, **settings})
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json .*{named}"):
        check(folder)


# ---------------------------------------------------------------------------------------------------------- tokenizers


# huggingface/transformers#20481, #15067: what the published files say, and what of it CLIPTokenizer never heeds.
@pytest.mark.parametrize(
    "settings",
    [
        {"model_max_length": 77, "do_lower_case": False, "add_prefix_space": False, "errors": "replace"},
        {"tokenizer_class": "CLIPTokenizerFast", "bos_token": {"content": "<|startoftext|>", "lstrip": False}},
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "!", "clean_up_tokenization_spaces": True},
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_settings_of_clips_tokenizer(folder, settings):
    CLIPTokenizer().save_pretrained(folder)
    change(folder, "tokenizer_config.json", **settings)
    check(folder)


# LAION-AI/CLIP_benchmark#19: models of CLIP's form with texts of another tokenizer.
@pytest.mark.parametrize("kind", ["XLMRobertaTokenizer", "T5TokenizerFast", "BertTokenizer"])
def test_another_tokenizer_is_refused(folder, kind):
    put_json(folder / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json .*tokenizer_class is '?{kind}.*another tok"):
        check(folder)


# huggingface/diffusers#10754: textual inversion adds tokens, of which the tokenizer here knows nothing.
def test_an_added_token_is_told(folder):
    added = {"49407": {"content": "<|endoftext|>"}, "49408": {"content": "<cat-toy>"}}
    put_json(folder / "tokenizer_config.json", tokenizer_class="CLIPTokenizer", added_tokens_decoder=added)
    with pytest.warns(UserWarning, match="not known here: the added token '?<cat-toy>'?\\. "):
        check(folder)


def test_an_unknown_setting_of_a_tokenizer_is_told(folder):
    put_json(folder / "tokenizer_config.json", tokenizer_class="CLIPTokenizer", dropout_of_merges=0.1)
    with pytest.warns(UserWarning, match="tokenizer_config.json has settings .*dropout_of_merges"):
        check(folder)


# --------------------------------------------------------------------------------------------------------- end of text


def features(model, ids, length=77):
    row = np.zeros((1, length), np.int64)
    row[0, : len(ids)] = ids
    with paddle.no_grad():
        return np.asarray(model.encode_text(paddle.to_tensor(row) if isinstance(model, paddle.nn.Layer) else row))


# huggingface/transformers#24650, #21029, huggingface/diffusers#10754: textual inversion adds tokens.
def test_the_feature_is_read_at_the_first_end_of_text(theirs, folder, tmp_path):
    row = torch.zeros((1, 77), dtype=torch.int64)
    row[0, : len(ADDED)] = torch.tensor(ADDED)
    with torch.no_grad():
        expected = theirs[0].text_projection(theirs[0].text_model(row).pooler_output).numpy()
    model, _ = paddle_clip.load(folder)
    assert model.config.eos_token_id == 599
    convert(folder, tmp_path / "x.pdparams")
    paddle_clip.export(model, tmp_path / "export")
    highest = paddle_clip.presets.build(SMALL)
    highest.set_state_dict(model.state_dict())
    for other in (model, paddle_clip.load(tmp_path / "x.pdparams")[0], Predictor(tmp_path / "export")):
        for row in (ADDED, [*ADDED, 599, 599]):  # padded with end-of-text, as Hugging Face's tokenizer does
            assert np.abs(features(other, row) - expected).max() < RELATIVE * np.abs(expected).max()
        assert np.abs(features(highest, ADDED) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("eos", "expected"), [(2, None), (601, None), (None, None), (599, 599), (3, 3)])
def test_the_end_of_text_of_a_hugging_face_config(folder, eos, expected):
    change(folder, section="text_config", eos_token_id=eos)
    assert check(folder)[0].config.eos_token_id == expected


def test_an_end_of_text_outside_the_vocabulary_is_told(folder):
    change(folder, section="text_config", eos_token_id=49407)
    with pytest.warns(UserWarning, match="49407, which is no token of a vocabulary of 602"):
        assert check(folder)[0].config.eos_token_id is None


def test_open_clips_end_of_text(tmp_path):
    assert check(open_clip_folder(tmp_path / "x"))[0].config.eos_token_id is None
    source = open_clip_folder(tmp_path / "x", text={"pool_type": "eos", "eos_id": 2})
    assert check(source)[0].config.eos_token_id == 2


# ------------------------------------------------------------------------------------------------------ heads and MLPs

# Heads of 16 and 32, and MLPs of 1.5 and 2.5 times the width, which no two sizes of OpenAI's models have.
WIDE = {"vision_head_width": 16, "vision_mlp_width": 96, "transformer_heads": 2, "transformer_mlp_width": 160}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Hugging Face's model of these sizes and its folder."""
    size, folder = {"hidden_size": 64, "num_hidden_layers": 2}, tmp_path_factory.mktemp("wide")
    text = {**size, "intermediate_size": 160, "num_attention_heads": 2, "vocab_size": 602, "eos_token_id": 601}
    vision = {**size, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    torch.manual_seed(1)
    model = CLIPModel(HuggingFaceConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model.double(), folder


def test_other_heads_and_mlps_compute_what_hugging_faces_do(wide, tmp_path):
    """mlfoundations/open_clip#219: ViT-H's heads are 80 wide; a width of 1280 has 20 heads by OpenAI's rule."""
    theirs, folder = wide
    random = np.random.default_rng(0)
    images, tokens = random.normal(size=[3, 3, 32, 32]), random.integers(1, 600, [3, 20])
    tokens[:, [5, 9]] = 601
    with torch.no_grad():
        pictures = theirs.visual_projection(theirs.vision_model(torch.from_numpy(images)).pooler_output).numpy()
        texts = theirs.text_projection(theirs.text_model(torch.from_numpy(tokens)).pooler_output).numpy()
    convert(folder, tmp_path / "x.safetensors")
    model, _ = paddle_clip.load(tmp_path / "x.safetensors", "float64")
    paddle_clip.save(model, tmp_path / "saved.pdparams")
    paddle_clip.export(paddle_clip.load(folder)[0], tmp_path / "export")
    for source in (folder, tmp_path / "x.safetensors", tmp_path / "saved.pdparams"):
        model, _ = paddle_clip.load(source, "float64")
        assert {name: getattr(model.config, name) for name in WIDE} == WIDE
        with paddle.no_grad():
            assert np.abs(model.encode_image(paddle.to_tensor(images)).numpy() - pictures).max() < 1e-12
            assert np.abs(model.encode_text(paddle.to_tensor(tokens)).numpy() - texts).max() < 1e-12
    predictor = Predictor(tmp_path / "export")
    assert np.abs(predictor.encode_image(images.astype(np.float32)) - pictures).max() < 1e-4
    assert np.abs(predictor.encode_text(tokens) - texts).max() < 1e-4


def test_heads_that_nothing_tells_are_asked_for(tmp_path, run):
    """A width of 1280, which ViT-H has with 16 heads and OpenAI's rule with 20, in a model that nobody published."""
    config = dataclasses.replace(SMALL, vision_width=1280, vision_layers=1)
    empty = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    put(tmp_path / "x.safetensors", dict(dialects.to_openai(name, array) for name, array in empty.items()))
    with pytest.raises(
        CheckpointError, match=r"does not tell how many heads .* 1280 wide: give them, such as heads=16"
    ):
        check(tmp_path / "x.safetensors")
    assert check(tmp_path / "x.safetensors", heads=16)[0].config.vision_head_width == 80
    with pytest.raises(ValueError, match="heads is 7, and the image tower is 1280 wide"):
        check(tmp_path / "x.safetensors", heads=7)
    done = run("-m", "paddle_clip", "convert", tmp_path / "x.safetensors")
    assert (done.returncode, "give them, such as --heads 16" in done.stderr) == (1, True)
    done = run("-m", "paddle_clip", "convert", tmp_path / "x.safetensors", "--heads", "16")
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "x.pdparams")[0].config.vision_head_width == 80


@pytest.mark.parametrize("row", [*presets.OPEN_CLIP, *presets.CHINESE], ids=lambda row: row.name)
def test_the_sizes_of_a_published_model_tell_its_heads(row):
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in parameter_shapes(row.config).items()}
    found = dialects.from_checkpoint(dict(dialects.to_openai(name, array) for name, array in state.items()))
    assert found.config == row.config
    numbers = [array.size for name, array in found.arrays.items() if not name.endswith(("_mean", "_variance"))]
    assert sum(numbers) == row.parameters


# ------------------------------------------------------------------------------------------- what is not computed here


@pytest.mark.parametrize(
    ("section", "settings", "named"),
    [
        ("", {"model_type": "siglip"}, "model_type is siglip"),  # and metaclip_2, huggingface/transformers#39821
        ("", {"projection_dim": 512}, "projection_dim is 512"),
        ("", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("", {"text_config": [1]}, "text_config is not a JSON object"),
        ("text_config", {"hidden_act": "gelu"}, r"activations \['gelu', 'quick_gelu'\]"),
        ("text_config", {"hidden_act": {}}, "activations"),
        ("text_config", {"eos_token_id": [2, 599]}, r"eos_token_id is \[2, 599\]"),
        ("text_config", {"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class"),
        ("vision_config", {"image_size": 40}, "image_size is 40"),
        ("vision_config", {"num_channels": 1}, "num_channels"),
        ("vision_config", {"num_attention_heads": 3}, "num_attention_heads is 3, expected a number that divides"),
    ],
)
def test_hugging_faces_other_models_are_refused(folder, section, settings, named):
    change(folder, section=section, **settings)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{named}") as error:
        check(folder)
    assert len(str(error.value)) < 1000


def test_the_dicts_of_old_files_are_what_transformers_takes(folder):
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = {**tower, "vocab_size": 602, "hidden_act": "gelu", "eos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16, "hidden_act": "gelu"}
    change(folder, text_config_dict=text, vision_config_dict=vision)
    assert CLIPModel.from_pretrained(folder).config.text_config.hidden_act == "gelu"
    config = check(folder)[0].config
    assert (config.activation, config.eos_token_id) == ("gelu", None)
    change(folder, text_config_dict=None, vision_config_dict=None)
    assert check(folder)[0].config.activation == "quickgelu"


@pytest.mark.parametrize(
    ("place", "settings", "named"),
    [
        ("text", {"pool_type": "last"}, "pool_type is last"),  # CLIPA, mlfoundations/open_clip#579
        ("text", {"no_causal_mask": True}, "no_causal_mask"),
        ("text", {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs"),
        ("text", {"act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
        ("text", {"hf_tokenizer_name": "bert-base-uncased"}, "tokenizer"),
        ("text", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs"),
        ("text", {"embed_cls": True}, "embed_cls"),
        ("text", {"heads": 3}, "heads is 3, expected a number that divides the width 64"),
        ("text", {"mlp_ratio": 4.5}, "mlp_ratio is 4.5, expected 4"),
        ("vision", {"head_width": 48}, "head_width is 48"),
        ("text", {"pool_type": "eos", "eos_id": 700}, "eos_id"),
        ("vision", {"pool_type": "avg"}, "pool_type is avg"),
        ("vision", {"no_ln_pre": True}, "no_ln_pre"),
        ("vision", {"attentional_pool": True}, "attentional_pool"),
        ("vision", {"ls_init_value": 0.1}, "ls_init_value"),
        ("vision", {"mlp_ratio": 3.5}, "mlp_ratio"),
        ("vision", {"timm_model_name": "vit_medium"}, "timm_model_name"),
        ("preprocess", {"interpolation": "nearest"}, "interpolation"),
        ("preprocess", {"size": [32, 48]}, "size"),
        ("preprocess", {"mode": "L"}, "mode"),
        ("preprocess", {"mean": "0.5"}, "mean"),
        ("preprocess", {"fill_color": 256}, "fill_color"),
    ],
)
def test_open_clips_other_models_are_refused(tmp_path, place, settings, named):
    source = open_clip_folder(tmp_path / "x", **{place: settings})
    with pytest.raises(CheckpointError, match=rf"open_clip_config\.json .*{place}\w*\..*{named}") as error:
        check(source)
    assert len(str(error.value)) < 1000


def open_clip_configs():
    folder = os.path.join(importlib.util.find_spec("open_clip").submodule_search_locations[0], "model_configs")
    return sorted(path for path in pathlib.Path(folder).glob("*.json"))


@pytest.mark.parametrize("path", open_clip_configs(), ids=lambda path: path.stem)
def test_every_setting_of_open_clips_models_is_known(path):
    """Its ResNets and ViTs of OpenAI's form are read, all others refused, none with an unknown setting."""
    model = json.loads(path.read_text())
    vision, text = (
        {"layers": 12, "heads": 8, "context_length": 77, **model[f"{tower}_cfg"]} for tower in ("vision", "text")
    )
    layers = tuple(vision["layers"]) if isinstance(vision["layers"], list) else vision["layers"]
    sizes = (vision["image_size"], layers, vision.get("width", 768), vision.get("patch_size"))
    text_sizes = (text.get("width", 512), text["heads"], text["layers"], text["context_length"])
    mlp_width = int(sizes[2] * vision["mlp_ratio"]) if "mlp_ratio" in vision else None
    config = presets.CLIPConfig(
        model["embed_dim"], *sizes, *text_sizes, text.get("vocab_size", 49408), vision_mlp_width=mlp_width
    )
    sheet = room._Sheet("open_clip_config.json", path.stem)
    told = room._open_clip(sheet, {"model_cfg": model}, config)
    assert not sheet.unknown
    openais = r"(?!.*(CLIPA|SigLIP|worldwide|M-16-alt))(RN|ViT-[SBLMHge]|ViT-bigG)(?!opt)"
    assert bool(sheet.wrong) != bool(re.match(openais, path.stem))
    if not sheet.wrong:
        assert told.vision_head_width == vision.get("head_width", 64)
    published = presets.preset_of(config)
    if published and published.name == path.stem:
        assert published.config == dataclasses.replace(config, vision_head_width=told.vision_head_width)


def test_the_other_programs_settings_are_read_where_its_own_are_missing(folder, tmp_path):
    """LAION's repositories hold weights and settings of both programs, and people download some of them."""
    source = open_clip_folder(tmp_path / "x", quick_gelu=False)
    settings = source / "open_clip_config.json"
    settings.rename(folder / settings.name)
    change(folder, section="text_config", hidden_act="gelu")
    change(folder, section="vision_config", hidden_act="gelu")
    (folder / "config.json").rename(source / "config.json")
    for place in (source, folder):
        assert check(place)[0].config.activation == "gelu"
    assert check(source)[0].config.eos_token_id == 599
    put_json(source / "config.json", model_type="blip", hidden_act="gelu")  # of something else
    assert check(source)[0].config.activation == "quickgelu"


def test_one_tower_alone_has_its_settings_at_the_top(folder):
    """Stable Diffusion's text encoder: huggingface/diffusers#10754 shows its config.json."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    sheet = room._Sheet("config.json", "x")
    assert room._hugging_face(sheet, {**text, "architectures": ["CLIPTextModel"]}, SMALL) == room.Settings(
        "quickgelu", eos_token_id=599, transformer_heads=1
    )
    sheet.close()


def test_harmless_settings_are_known(folder, tmp_path):
    change(folder, section="text_config", attention_dropout=0.1, pruned_heads={}, return_dict=True, torch_dtype=None)
    text = {"hf_tokenizer_name": None, "output_tokens": False, "pad_id": 0, "act_kwargs": None, "norm_kwargs": {}}
    vision = {"patch_dropout": 0.5, "head_width": 64, "mlp_ratio": 4.0, "timm_model_name": None}
    source = open_clip_folder(tmp_path / "x", vision, text, custom_text=False, init_logit_bias=None, quick_gelu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(folder)
        check(source)


def test_unknown_settings_are_told_once_and_a_dozen(folder, tmp_path):
    change(folder, section="vision_config", use_rope=True, **{f"x{number}": 1 for number in range(20)})
    with pytest.warns(UserWarning, match=r"vision_config\.use_rope, .* and 9 more") as warned:
        check(folder)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=r"vision_cfg\.rope"):
        check(open_clip_folder(tmp_path / "x", {"rope": True}))


def test_metadata_that_cannot_be_is_refused(tmp_path):
    described = {"activation": "gelu", "preprocessing": json.dumps({**LAION, "fill_color": 0}), "eos_token_id": "7"}
    for wrong, named in (
        ({"activation": "silu"}, "activation is silu"),
        ({"preprocessing": "{"}, "cannot be read"),
        ({"preprocessing": '{"mean": [1]}'}, "mean"),
        ({"eos_token_id": "-1"}, "eos_token_id"),
        ({"eos_token_id": "602"}, "eos_token_id"),
        ({}, ""),
    ):
        metadata = {**described, **wrong}
        write(tmp_path / "x.safetensors", weights(), lambda name: "keep", lambda checksums: metadata)  # noqa: B023
        if not wrong:
            report, _ = check(tmp_path / "x.safetensors")
            assert (report.config.activation, report.config.eos_token_id) == ("gelu", 7)
            assert report.preprocessing == SQUASHED
            break
        with pytest.raises(CheckpointError, match=named):
            check(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"],
)
def test_a_folder_is_the_model_in_it(tmp_path, name):
    """ChenDelong1999/RemoteCLIP#32, haotian-liu/LLaVA#120, CompVis/stable-diffusion#436: a folder is downloaded."""
    put(tmp_path / name, weights())
    put_json(tmp_path / "open_clip_config.json", model_cfg={"quick_gelu": False})
    report = convert(f"{tmp_path}{os.sep}")
    assert report.output == os.path.join(tmp_path, f"{name.partition('.')[0]}.pdparams")
    assert report.config.activation == check(tmp_path)[0].config.activation == "gelu"


def test_the_command_line_takes_folders(tmp_path, run):
    for name in ("clip.a", "clip.b"):
        open_clip_folder(tmp_path / name)
    done = run("-m", "paddle_clip", "convert", tmp_path / "clip.a", tmp_path / "clip.b")
    assert done.returncode == 0, done.stderr
    assert "pictures   mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], bilinear, resize mode squash" in done.stdout
    assert (tmp_path / "clip.b" / "open_clip_model.pdparams").exists()


def test_a_folder_may_hold_one_model_twice(folder):
    """As LAION's repositories do."""
    model = paddle_clip.load(folder)[0]
    save(model, folder / "x.pt")
    os.replace(folder / "x.pt", folder / "open_clip_pytorch_model.bin")
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Hugging Face" in check(folder)[0].kind


def test_a_folder_of_several_models_is_refused(folder):
    put(folder / "open_clip_model.safetensors", weights())
    with pytest.raises(CheckpointError, match=r"several models: model\.safetensors, open_clip_model\.safetensors"):
        paddle_clip.load(folder)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        check(tmp_path)
    for number in range(20):
        (tmp_path / f"{number:02}.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, .* found 00\.bin, .*11\.bin and 8 more"):
        paddle_clip.load(tmp_path)


def test_an_export_is_named_as_one(tmp_path):
    paddle_clip.export(presets.build(SMALL), tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"exported model.* run it with paddle_clip\.Predictor"):
        paddle_clip.load(tmp_path / "export")


def test_a_snapshot_of_links(folder, tmp_path):
    """Stability-AI/stablediffusion#73, huggingface/diffusers#6321: the hub's cache, whose files have other names."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a1b", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    put_json(folder / "preprocessor_config.json", image_mean=[0.5] * 3, size=32, crop_size=32)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", f"{number:064}"))
    for path in (snapshot, snapshot / "model.safetensors"):
        report, _ = check(path)
        assert report.config.eos_token_id == 599
        assert report.preprocessing.mean == (0.5, 0.5, 0.5)


def shard(folder, arrays, extension, parts=3):
    """Writes tensors as shards and their index, as Hugging Face does."""
    stem = "model" if extension == "safetensors" else "pytorch_model"
    names, places = list(arrays), {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05}-of-{parts:05}.{extension}"
        put(folder / file, {name: arrays[name] for name in names[part::parts]})
        places.update(dict.fromkeys(names[part::parts], file))
    put_json(folder / f"{stem}.{extension}.index.json", metadata={}, weight_map=places)


@pytest.mark.parametrize("extension", ["bin", "safetensors"])
def test_shards(tmp_path, extension):
    """openai/CLIP#497, huggingface/transformers#17959: pytorch_model.bin.index.json."""
    arrays = weights()
    shard(tmp_path, arrays, extension)
    report, _ = check(tmp_path, activation="gelu")
    assert report.kind.startswith("sharded ")
    assert report.tensors == len(arrays)
    stem = "model" if extension == "safetensors" else "pytorch_model"
    assert convert(tmp_path, activation="gelu").output == str(tmp_path / f"{stem}.pdparams")
    first = next(tmp_path.glob("*-00001-of-00003.*"))
    put(first, weights())
    with pytest.raises(CheckpointError, match=r"does not hold what the index says: .* and [0-9]+ more"):
        check(tmp_path)
    first.write_bytes(b"version https://git-lfs")
    with pytest.raises(CheckpointError, match="00001-of-00003"):
        check(tmp_path)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"names shards that are not beside it: \S+00001-of-00003\S+\. Download"):
        check(tmp_path)


def test_a_compiled_form_belongs_to_the_settings_and_shards(tmp_path):
    from paddle_clip.compiled import _folder

    arrays = weights()
    shard(tmp_path, arrays, "bin")

    def key():
        return _folder(str(tmp_path / "pytorch_model.bin.index.json"), "paddle", tmp_path, {})

    first = key()
    assert key() == first
    put_json(tmp_path / "preprocessor_config.json", image_mean=[0.5] * 3)
    second = key()
    arrays["logit_scale"] = arrays["logit_scale"] + 1
    shard(tmp_path, arrays, "bin")
    assert len({first, second, key()}) == 3


def test_settings_that_are_not_read_are_told(tmp_path):
    """What paddle.save writes has no metadata, and its names do not tell whose settings those beside it are."""
    model, _ = paddle_clip.load(open_clip_folder(tmp_path / "hub") / "open_clip_model.safetensors")
    paddle.save(model.state_dict(), str(tmp_path / "hub" / "mine.pdparams"))
    with pytest.warns(UserWarning, match=r"open_clip_config\.json beside it is not read.*paddle_clip\.save"):
        check(tmp_path / "hub" / "mine.pdparams")
    save(model, tmp_path / "hub" / "mine.pdparams")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert check(tmp_path / "hub" / "mine.pdparams")[0].config.activation == "gelu"
