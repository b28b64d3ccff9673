"""Models in other shapes than one whole model in one place: several in a file, towers alone, other tables of positions.

The public reports that each kind is taken from are named as repository#number.
"""

import re
import warnings

import numpy as np
import paddle
import pytest
import torch
from torch.nn import functional

import paddle_clip
from paddle_clip import CheckpointError, compiled
from paddle_clip.checkpoints import dialects, positions
from paddle_clip.checkpoints.conversion import check, convert
from paddle_clip.checkpoints.shapes import parameter_shapes
from paddle_clip.errors import listed
from variants import TINY, VARIANTS

BOTH = pytest.mark.parametrize("variant", sorted(TINY))
VIT = TINY["tiny_vit"]


def ours(config, seed=0):
    """A random state dict in our names and layouts."""
    random = np.random.default_rng(seed)
    return {n: random.normal(0, 0.1, shape).astype("float32") for n, shape in parameter_shapes(config).items()}


def openai(arrays):
    """The same in OpenAI's names and layouts."""
    return dict(dialects.to_openai(name, array) for name, array in arrays.items())


def equal(found, expected):
    """Whether two dicts hold the same arrays, bit for bit and in order of dimensions."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name, strict=True)
    return True


def save(path, state):
    """Writes nested dicts of arrays as PyTorch does."""

    def tensors(node):
        if isinstance(node, dict):
            return {name: tensors(value) for name, value in node.items()}
        return torch.tensor(np.array(node))

    torch.save(tensors(state), path)
    return path


def hugging_face(arrays):
    """Our arrays in the names and layouts of Hugging Face, by the rules read backwards."""
    return backwards(arrays, dialects.HUGGING_FACE)


def backwards(arrays, rules):
    """Our arrays in the names and layouts that rules translate from."""
    found = {}
    for name, array in arrays.items():
        letters = "qkv" if "attn.in_proj" in name else ""
        parts = [(f"{name}#{letter}", part) for letter, part in zip(letters, np.split(array, 3, -1) if letters else ())]
        for our_name, part in parts or [(name, array)]:
            for theirs, target, transposed in rules:
                match = re.fullmatch(re.escape(target).replace(r"\{\}", "(.+)"), our_name)
                if match and target != "{}":
                    found[theirs.format(*match.groups())] = part.T if transposed else part
                    break
            else:
                found[our_name] = part
    return found


# ------------------------------------------------------------------------------------------------------- several models


@BOTH
def test_a_prefix_chooses_a_model(tmp_path, variant):
    """Zasder3/train-CLIP-FT#10: the student and its teacher in one file."""
    student, teacher = ours(TINY[variant]), ours(TINY[variant], 1)
    state = {f"model.{n}": a for n, a in openai(student).items()} | {
        f"teacher.{n}": a for n, a in openai(teacher).items()
    }
    for prefix in ("teacher.", "teacher"):
        assert equal(dialects.from_checkpoint(state, prefix=prefix).arrays, teacher)
    path = save(tmp_path / "x.pt", state)
    report = convert(path, tmp_path / "y.pdparams", prefix="teacher.")
    assert report.prefix == "teacher."
    assert report.ignored == len(student)
    assert equal(dialects.from_checkpoint(paddle.load(str(tmp_path / "y.pdparams"), return_numpy=True)).arrays, teacher)
    model, _ = paddle_clip.load(path, activation="quickgelu", prefix="model.")
    assert equal({name: tensor.numpy() for name, tensor in model.state_dict().items()}, student)
    with pytest.raises(CheckpointError, match=r"several models: model\.\*, teacher\.\*; .* prefix='model\.'"):
        check(path)
    with pytest.raises(CheckpointError, match=r"no model under prefix='ema'; it has model\.\*, teacher\.\*"):
        check(path, prefix="ema")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (("state_dict.", "ema_state_dict."), "ema_state_dict"),
        (("state_dict.", "state_dict_ema."), "state_dict_ema"),  # huggingface/pytorch-image-models
        (("", "ema."), "ema."),
        (("", "ema."), ""),
        (("model.", "model.module."), "model.module."),  # AveragedModel within a model
        (("model.", "model.module."), "model."),
        (("state_dict.module._orig_mod.", "ema.module."), "state_dict"),
        (("state_dict.module._orig_mod.", "ema.module."), "ema.module"),
    ],
)
def test_models_of_a_file_are_told_apart(names, prefix):
    models = {name: ours(VIT, seed) for seed, name in enumerate(names)}
    state = {prefix + n: a for prefix, arrays in models.items() for n, a in openai(arrays).items()}
    with pytest.raises(CheckpointError, match="holds several models: "):
        dialects.from_checkpoint(state)
    chosen = next((n for n in names if n in (prefix, f"{prefix}.")), next(n for n in names if n.startswith(prefix)))
    assert equal(dialects.from_checkpoint(state, prefix=prefix).arrays, models[chosen])


def test_a_whole_model_is_not_mistaken_for_towers_or_scales_beside_it():
    arrays = ours(VIT)
    beside = {"loss.logit_scale": np.ones(1, np.float32), "teacher.visual.class_embedding": np.ones(64, np.float32)}
    state = {f"state_dict.{n}": a for n, a in openai(arrays).items()} | beside
    found = dialects.from_checkpoint(state)
    assert equal(found.arrays, arrays)
    assert found.ignored == 2


def test_the_command_line_names_its_options(run, tmp_path):
    state = openai(ours(VIT))
    save(tmp_path / "x.pt", {"ema": state, "model": state})
    done = run("-m", "paddle_clip", "convert", tmp_path / "x.pt", "--check")
    assert done.returncode == 1
    assert "such as --prefix ema." in done.stderr
    done = run("-m", "paddle_clip", "convert", tmp_path / "x.pt", "--check", "--prefix", "model.", "--resolution", "64")
    assert done.returncode == 0, done.stderr
    assert "beside model.* ignored" in done.stdout
    assert "image_resolution 64" in done.stdout


# ------------------------------------------------------------------------------------------------------ wrapped modules


@BOTH
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,  # mlfoundations/open_clip#639
        lambda name: "_orig_mod.module." + name,  # huggingface/pytorch-image-models#2003
        lambda name: "module._orig_mod." + name,
        lambda name: "_forward_module.module." + name,
        lambda name: name.replace("visual.", "visual.module.").replace("transformer.", "transformer._orig_mod."),
        lambda name: (
            "_fsdp_wrapped_module."
            + re.sub(r"(resblocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name)
        ),
        lambda name: name.replace("mlp.", "mlp.module.") if "resblocks.0" in name else f"module.{name}",
    ],
)
def test_wrappers_are_taken_out_of_names(variant, wrap):
    arrays = ours(TINY[variant])
    for prefix in ("", "state_dict."):
        state = {prefix + wrap(name): array for name, array in openai(arrays).items()}
        assert equal(dialects.from_checkpoint(state).arrays, arrays)


def test_what_lies_beside_a_wrapper_is_no_part_of_the_model():
    """DeepSpeed's checkpoints: {"module": ..., "optimizer": ...}; jiazhou-garland/EventBind#4: a model deep within."""
    arrays, beside = ours(VIT), {"optimizer.state.0.exp_avg": np.ones(3, np.float32), "step": np.ones([], np.float32)}
    for prefix in ("module.", "module.prompt_leranable.clip_model."):
        state = {prefix + name: array for name, array in openai(arrays).items()}
        found = dialects.from_checkpoint(state | beside)
        assert equal(found.arrays, arrays)
        assert (found.ignored, found.prefix) == (2, prefix)
    state = {f"module.{name}": array for name, array in {**openai(arrays), "head.weight": np.ones(3)}.items()}
    with pytest.raises(CheckpointError, match=r"1 unexpected: head\.weight"):
        dialects.from_checkpoint(state | beside)


def test_flat_parameters_are_named():
    state = {"_fsdp_wrapped_module._flat_param": np.ones(9, np.float32)}
    with pytest.raises(CheckpointError, match="FSDP's flat parameters"):
        dialects.from_checkpoint(state)


# ------------------------------------------------------------------------------------------------------ names and forms


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        *((variant, form) for variant in sorted(TINY) for form in ("ours", "openai", "open_clip", "paddlenlp")),
        ("tiny_vit", "hugging_face"),
        ("tiny_vit", "paddlemix"),
    ],
)
def test_a_scale_of_one_element_is_taken_in_every_dialect(variant, form):
    """openai/CLIP#67, Sense-GVT/DeCLIP#18, kijai/ComfyUI-MMAudio#41."""
    arrays = ours(TINY[variant])
    state = {
        "ours": lambda: dict(arrays),
        "openai": lambda: openai(arrays),
        "open_clip": lambda: {
            n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}": a for n, a in openai(arrays).items()
        },
        "hugging_face": lambda: hugging_face(arrays),
        "paddlenlp": lambda: paddlenlp(arrays),
        "paddlemix": lambda: backwards(arrays, dialects.PADDLEMIX),
    }[form]()
    for shape in ((), (1,)):
        state["logit_scale"] = state["logit_scale"].reshape(shape)
        assert equal(dialects.from_checkpoint(state, activation="gelu").arrays, arrays)


def paddlenlp(arrays):
    """Our arrays in PaddleNLP's names (PaddlePaddle/PaddleNLP#4270, #5595, PaddlePaddle/PaddleMIX#298)."""
    state = backwards(arrays, [rule for rule in dialects.PADDLENLP if rule[0] != "text_model.{}"])
    text = ("token_embedding.", "ln_final.")
    return {f"text_model.{n}" if n.startswith(text) else n: a for n, a in state.items()}


def test_paddlenlps_names_are_those_of_its_converter():
    """As in paddlenlp/transformers/clip/converter.py."""
    names = paddlenlp(ours(VIT)).keys()
    assert {
        "text_model.token_embedding.weight",
        "text_model.positional_embedding.weight",
        "text_model.ln_final.weight",
        "text_model.transformer.layers.0.self_attn.q_proj.weight",
        "text_model.transformer.layers.0.linear1.bias",
        "text_model.transformer.layers.0.norm2.weight",
        "text_projection",
        "vision_model.class_embedding",
        "vision_model.conv1.weight",
        "vision_model.positional_embedding.weight",
        "vision_model.ln_pre.weight",
        "vision_model.transformer.layers.0.self_attn.out_proj.weight",
        "vision_projection",
        "logit_scale",
    } <= names


# --------------------------------------------------------------------------------------------------------- towers alone


def towers(config):
    """{form: (tower, state dict)} of towers alone."""
    arrays = openai(ours(config))
    image = {name: array for name, array in arrays.items() if name.startswith("visual.")}
    text = {name: array for name, array in arrays.items() if not name.startswith("visual.")}
    forms = {
        "OpenAI's image tower": ("image", image),
        "its image tower in a training checkpoint": ("image", {f"state_dict.model.{n}": a for n, a in image.items()}),
        "its image tower beside a head": ("image", {**image, "head.weight": np.ones([3, 8], np.float32)}),
        "its image tower, bare": ("image", {name[len("visual.") :]: array for name, array in image.items()}),
        "its text tower": ("text", text),
        "its text tower without a scale": ("text", {n: a for n, a in text.items() if n != "logit_scale"}),
        "open_clip's text tower": ("text", {f"text.{n}": a for n, a in text.items() if n != "logit_scale"}),
    }
    if config.is_vit:
        state = hugging_face(ours(config))
        image = {name: array for name, array in state.items() if name.startswith("vis")}
        text = {name: array for name, array in state.items() if name.startswith("text")}
        diffusion = {"model.diffusion_model.out.weight": np.ones([2, 2], np.float32)}
        forms |= {
            "CLIPVisionModelWithProjection": ("image", image),
            "CLIPTextModelWithProjection": ("text", text),
            "LLaVA's image tower": ("image", {f"model.vision_tower.{n}": a for n, a in image.items()} | diffusion),
            "Stable Diffusion's text encoder": (  # gligen/GLIGEN#67
                "text",
                {f"cond_stage_model.transformer.{n}": a for n, a in text.items()} | diffusion,
            ),
            "ppdiffusers' text encoder": (
                "text",
                {n: a for n, a in backwards(ours(config), dialects.PADDLEMIX).items() if n.startswith("text_")},
            ),
            "PaddleNLP's image tower": ("image", {n: a for n, a in paddlenlp(ours(config)).items() if n[:3] == "vis"}),
        }
    return forms


@BOTH
def test_a_tower_alone_encodes_as_in_the_whole_model(tmp_path, variant):
    """OML-Team/open-metric-learning#354, huggingface/transformers#18853, zer0int/CLIP-fine-tune#16."""
    config = TINY[variant]
    whole = paddle_clip.presets.build(config)
    whole.set_state_dict(ours(config))
    whole.eval()
    images = paddle.randn([2, 3, config.image_resolution, config.image_resolution])
    tokens = paddle.randint(0, config.vocab_size, [2, config.context_length])
    for form, (tower, state) in towers(config).items():
        path = save(tmp_path / "x.pt", state)
        kind = check(path, "quickgelu")[0].kind
        assert kind.endswith({"image": "an image tower alone", "text": "a text tower alone"}[tower]), form
        for output in ("y.pdparams", "y.safetensors", "y.pt"):
            convert(path, tmp_path / output, "keep", "quickgelu")
            with pytest.warns(UserWarning, match=f"{tower} tower alone: encode_"):
                model, preprocess = paddle_clip.load(tmp_path / output, activation="quickgelu")
            if tower == "image":
                np.testing.assert_array_equal(model.encode_image(images), whole.encode_image(images), form)
                assert preprocess.resolution == config.image_resolution
                with pytest.raises(ValueError, match="image tower alone: encode_text takes the whole model"):
                    model.encode_text(tokens)
                with pytest.raises(ValueError, match="image tower alone: encode_text takes the whole model"):
                    paddle_clip.encode_texts(model, ["a dog"])
            else:
                np.testing.assert_array_equal(model.encode_text(tokens), whole.encode_text(tokens), form)
                with pytest.raises(ValueError, match="text tower alone: encode_image takes the whole model"):
                    model.encode_image(images)
                with pytest.raises(ValueError, match="takes no images"):
                    preprocess(np.zeros([4, 4, 3], np.uint8))
            with pytest.raises(ValueError, match="one tower alone"):
                paddle_clip.export(model, tmp_path / "export")


def test_towers_without_projections_give_what_hugging_face_pools():
    """CLIPTextModel and CLIPVisionModel; transformers 5 leaves out the start of their names."""
    state = hugging_face(ours(VIT))
    for start, our_projection in (("text_model.", "text_projection"), ("vision_model.", "visual.proj")):
        tower = {name: array for name, array in state.items() if name.startswith(start)}
        bare = {name[len(start) :]: array for name, array in tower.items()}
        ids = {"embeddings.position_ids": np.arange(4), **bare}
        found = [dialects.from_checkpoint(each, activation="quickgelu") for each in (tower, bare, ids)]
        for each in found:
            assert each.config.embed_dim == 0
            assert our_projection not in each.arrays
            model = paddle_clip.presets.build(each.config)
            model.set_state_dict(each.arrays)
            if start == "text_model.":
                features = model.encode_text(paddle.zeros([1, 4], "int64"))
                assert features.shape == [1, VIT.transformer_width]
            else:
                features = model.encode_image(paddle.zeros([1, 3, 32, 32]))
                assert features.shape == [1, VIT.vision_width]
            assert model.embed_dim == features.shape[1]


@pytest.mark.parametrize("names", [hugging_face, paddlenlp])
def test_a_tower_that_leaves_a_doubt_about_its_heads_is_refused(names):
    """ViT-H's image tower, as in IP-Adapter: 16 heads, which shapes do not tell, where 1280 / 64 would be 20."""
    config = VIT.__class__(8, 32, 1, 1280, 16, 64, 1, 1, 4, 20)
    empty = {n: np.broadcast_to(np.float32(0), shape) for n, shape in parameter_shapes(config).items()}
    state = {name: array for name, array in names(empty).items() if name.startswith("vis")}
    with pytest.raises(CheckpointError, match="give them, such as heads=16"):
        dialects.from_checkpoint(state, activation="gelu")
    assert dialects.from_checkpoint(state, activation="gelu", heads=16).config.vision_head_width == 80


def test_two_towers_that_are_no_model_are_told():
    """Stable Diffusion XL has two text encoders."""
    text = {n: a for n, a in openai(ours(VIT)).items() if not n.startswith("visual.") and n != "logit_scale"}
    state = {f"{name}.{n}": a.copy() for name in ("first", "second") for n, a in text.items()}
    with pytest.raises(CheckpointError, match=r"several towers: first\.\*, second\.\*; .*prefix='first\.'"):
        dialects.from_checkpoint(state)
    assert dialects.from_checkpoint(state, prefix="second").alone == "a text tower alone"


def test_a_tower_is_compared_strictly():
    _, state = towers(VIT)["its image tower, bare"]
    with pytest.raises(CheckpointError, match=r"\(an image tower alone\) does not fit: 1 unexpected: visual\.fc"):
        dialects.from_checkpoint({**state, "fc": np.ones(2, np.float32)})
    del state["ln_post.bias"]
    with pytest.raises(CheckpointError, match=r"\(an image tower alone\) does not fit: 1 missing: visual\.ln_post"):
        dialects.from_checkpoint(state)


# ------------------------------------------------------------------------------------------------------------ positions


def torchs(table, size):
    """open_clip's `resize_pos_embed`: [1 + S * S, D] -> [1 + T * T, D]."""
    table = torch.from_numpy(table)
    side = round((len(table) - 1) ** 0.5)
    grid = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(size * size, -1)]).numpy()


@pytest.mark.parametrize(
    ("size", "new"), [(7, 14), (14, 7), (24, 16), (16, 24), (7, 3), (2, 5), (5, 1), (1, 3), (14, 13)]
)
def test_grids_are_resized_as_pytorch_does(size, new):
    """Within rounding: 2e-16 is measured in float64, 4e-7 in PyTorch's float32."""
    table = np.random.default_rng(0).normal(size=[size * size + 1, 8])
    arrays, config = {"visual.positional_embedding": table}, VIT.__class__(8, size * 16, 1, 64, 16, 64, 1)
    assert positions.resize_grid(arrays, config, new * 16, "x").image_resolution == new * 16
    np.testing.assert_allclose(arrays["visual.positional_embedding"], torchs(table, new), rtol=0, atol=1e-12)
    np.testing.assert_allclose(positions.bicubic(size, new).sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_resolution_interpolates_the_image_positions_alone(tmp_path, variant):
    """mlfoundations/open_clip#76, jefferyZhan/Griffon#18, openai/CLIP#214 (ResNets)."""
    config, arrays = VARIANTS[variant], ours(VARIANTS[variant])
    cell = config.vision_patch_size or 32
    name = "visual.positional_embedding" if config.is_vit else "visual.attnpool.positional_embedding"
    for resolution in (config.image_resolution - cell, config.image_resolution, config.image_resolution + 2 * cell):
        found = dialects.from_checkpoint(arrays, resolution=resolution)
        expected = {**arrays, name: torchs(arrays[name], resolution // cell)}
        assert found.config.image_resolution == resolution
        np.testing.assert_allclose(found.arrays[name], expected[name], rtol=0, atol=1e-6)
        assert found.arrays[name].dtype == np.float32
        assert equal({**found.arrays, name: expected[name]}, expected)
    path = save(tmp_path / "x.pt", openai(arrays))
    for dtype in ("float16", "bfloat16"):
        convert(path, tmp_path / "half.safetensors", dtype)
        halves = convert(tmp_path / "half.safetensors", tmp_path / "half.pdparams", "keep", resolution=resolution)
        assert halves.config.image_resolution == resolution
        assert paddle.load(str(tmp_path / "half.pdparams"))[name].dtype == getattr(paddle, dtype)
    model, preprocess = paddle_clip.load(path, activation="gelu", resolution=resolution)
    assert preprocess.resolution == resolution
    assert model.encode_image(paddle.zeros([1, 3, resolution, resolution])).shape == [1, config.embed_dim]
    with pytest.raises(ValueError, match=rf"takes multiples of {cell} pixels"):
        dialects.from_checkpoint(arrays, resolution=resolution + 1)


def test_a_compiled_form_is_of_one_model_at_one_resolution(tmp_path):
    path = save(tmp_path / "x.pt", {"ema": openai(ours(VIT)), "model": openai(ours(VIT, 1))})
    asked = {"cache_dir": tmp_path, "activation": "quickgelu", "prefix": "model.", "resolution": 64}
    predictor, preprocess = paddle_clip.load_compiled(path, "paddle", **asked)
    assert preprocess.resolution == 64
    model, _ = paddle_clip.load(path, **asked)
    images = np.random.default_rng(0).normal(size=[2, 3, 64, 64]).astype(np.float32)
    features = model.encode_image(paddle.to_tensor(images)).numpy()
    np.testing.assert_allclose(predictor.encode_image(images), features, atol=1e-5)
    assert compiled.has_form(path, "paddle", **asked)
    for other in ({"prefix": "ema."}, {"resolution": 32}, {"resolution": None}):
        assert not compiled.has_form(path, "paddle", **{**asked, **other})


def test_a_text_tower_has_no_resolution():
    with pytest.raises(ValueError, match="takes no images, but resolution=64"):
        dialects.from_checkpoint(towers(VIT)["its text tower"][1], resolution=64)


def test_a_grid_that_is_not_square_is_named():
    """Syliz517/CLIP-ReID#36: 16 x 8 positions of pedestrians."""
    for count in (16 * 8, 12, 196 - 1):
        state = openai(ours(VIT))
        state["visual.positional_embedding"] = np.zeros([count + 1, 64], np.float32)
        with pytest.raises(
            CheckpointError, match=f"has {count} positions beside the first, and their grid is not square"
        ):
            dialects.from_checkpoint(state)


@pytest.mark.parametrize("form", ["OpenAI", "open_clip", "Hugging Face"])
def test_long_clips_two_tables_become_one(form):
    """beichenzbc/Long-CLIP, SeaArtLab/ComfyUI-Long-CLIP#21: 20 positions of CLIP's, the others interpolated."""
    arrays = ours(VIT.__class__(8, 32, 1, 64, 16, 64, 1, 1, 248, 20))
    random = np.random.default_rng(1)
    first, rest = (random.normal(size=[248, 64]).astype(np.float32) for _ in range(2))
    name = {"OpenAI": "positional_embedding", "open_clip": "text.positional_embedding"}.get(form)
    if form == "Hugging Face":
        state = hugging_face(arrays)
        name = "text_model.embeddings.position_embedding"
        state |= {f"{name}.weight": first, f"{name}_res.weight": rest}
    else:
        start = name[: -len("positional_embedding")]
        state = {
            n if n.startswith("visual.") or n == "logit_scale" else start + n: a for n, a in openai(arrays).items()
        }
        state |= {name: first, f"{name}_res": rest}
    found = dialects.from_checkpoint(state, activation="quickgelu")
    mask = np.arange(248)[:, None] < 20  # Long-CLIP's mask1; its mask2 is the rest
    assert found.config.context_length == 248
    assert equal(found.arrays, {**arrays, "positional_embedding": first * mask + rest * ~mask})
    state = {**state, next(n for n in state if "_res" in n): rest[1:]}
    with pytest.raises(CheckpointError, match=r"1 unexpected: positional_embedding_res \[247, 64\]"):
        dialects.from_checkpoint(state, activation="quickgelu")


# ------------------------------------------------------------------------------------------------------------- messages


def test_messages_are_short():
    long = {f"visual.{'attention' * 9}.{number}.weight": np.ones([2, 2]) for number in range(900)}
    state = {**openai(ours(VIT)), **long}
    state["ln_final.bias"] = np.ones(3, np.float32)
    del state["visual.ln_pre.weight"]
    with pytest.raises(CheckpointError) as error:
        dialects.from_checkpoint(state, "x.pt")
    message = str(error.value)
    assert len(message) < 1000
    assert re.search(
        r"1 missing: visual\.ln_pre\.weight \[64\]; 900 unexpected: .* and 89\d more; 1 misshapen: ", message
    )


def test_lists_end_with_how_many_more():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(12)]) == ", ".join(str(n) for n in range(12))
    assert listed([str(n) for n in range(1013)]).endswith("10, 11 and 1,001 more")
    assert "\n" not in listed(["a\nb"])
    assert len(listed(["x" * 10_000])) < 200
    models = {f"{index}.{n}": a for index in range(30) for n, a in openai(ours(VIT)).items()}
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"several models: .* and 18 more; choose"):
        dialects.from_checkpoint(models)
