"""The networks: initialisation, precision, gradients, static graphs, and refused inputs."""

import math

import numpy as np
import paddle
import pytest

from paddle_clip import CheckpointError, model, presets
from paddle_clip.checkpoints import dialects
from paddle_clip.checkpoints.shapes import parameter_shapes
from paddle_clip.layers import undrawn
from variants import RESNET, VARIANTS, VIT

BOTH = pytest.mark.parametrize("variant", sorted(VARIANTS))


def inputs(config, batch=3):
    images = paddle.randn([batch, 3, config.image_resolution, config.image_resolution])
    tokens = np.random.default_rng(0).integers(1, config.vocab_size - 1, [batch, config.context_length])
    for row, end in enumerate([config.context_length - 1, 3, 7, 5][:batch]):
        tokens[row, end] = config.vocab_size - 1
        tokens[row, end + 1 :] = 0
    return images, paddle.to_tensor(tokens)


@pytest.fixture
def clip(variant):
    model = presets.build(VARIANTS[variant])
    model.eval()  # it returns nothing in Paddle 2
    return model


FACTORIES = {
    "RN50": presets.clip_rn50,
    "RN101": presets.clip_rn101,
    "RN50x4": presets.clip_rn50x4,
    "RN50x16": presets.clip_rn50x16,
    "RN50x64": presets.clip_rn50x64,
    "ViT-B/32": presets.clip_vit_b_32,
    "ViT-B/16": presets.clip_vit_b_16,
    "ViT-L/14": presets.clip_vit_l_14,
    "ViT-L/14@336px": presets.clip_vit_l_14_336px,
}


@pytest.mark.parametrize("row", presets.PRESETS, ids=lambda row: row.name)
def test_factories_build_the_full_size(row):
    with undrawn():  # what is drawn is tested below
        built = FACTORIES[row.name]()
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    assert shapes == parameter_shapes(row.config)
    assert sum(parameter.size for parameter in built.parameters()) == row.parameters
    assert len({id(parameter) for parameter in built.parameters()}) == len(built.parameters())
    assert built.visual.input_resolution == row.config.image_resolution


@pytest.mark.parametrize(("file", "build"), [("RN50.pt", presets.clip_rn50), ("ViT-B-32.pt", presets.clip_vit_b_32)])
def test_initialisation_is_openais(files, file, build):
    """Mean, standard deviation and range of every parameter, against a fresh model of OpenAI's code."""
    with np.load(files / f"{file}.init.npz") as statistics:
        expected = {dialects.to_paddle(name, np.zeros([1, 1]))[0]: values for name, values in statistics.items()}
    parameters = dict(build().named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        array = parameter.numpy().astype(np.float64)
        mean, std, largest = expected[name]
        error = 1 / math.sqrt(array.size)  # error of the mean in standard deviations; the deviation has a smaller error
        assert abs(array.mean() - mean) <= 8 * error * std + 1e-7, name
        assert abs(array.std() - std) <= 6 * error * std + 1e-7, name
        assert np.abs(array).max() <= 1.6 * largest + 1e-7, name  # uniform or normal


def test_logit_scale_starts_at_the_papers_temperature():
    scale = presets.build(VIT).logit_scale
    assert scale.shape == []
    assert float(scale) == pytest.approx(math.log(1 / 0.07))


@BOTH
def test_the_mask_is_in_no_state_dict(clip):
    assert not [name for name in clip.state_dict() if "mask" in name]
    assert not [name for name, _ in clip.named_buffers() if "mask" in name]


@BOTH
def test_text_features_see_up_to_their_own_end_only(device, clip, variant):
    """Causal mask and end-of-text: a row's feature is that of the row alone and ignores what follows its end."""
    _, tokens = inputs(VARIANTS[variant])
    with paddle.no_grad():
        features = clip.encode_text(tokens).numpy()
        for row, end in enumerate([VARIANTS[variant].context_length - 1, 3, 7]):
            alone = clip.encode_text(tokens[row : row + 1, : end + 1]).numpy()
            np.testing.assert_allclose(alone[0], features[row], rtol=1e-4, atol=1e-5)
            changed = tokens[row : row + 1].clone()
            changed[:, end + 1 :] = 5
            same = clip.encode_text(tokens[row : row + 1]).numpy()
            np.testing.assert_array_equal(clip.encode_text(changed).numpy(), same)


def test_the_attention_pools_mean_has_float64_gradients(monkeypatch):
    """A ninth rounded to float32 on the way is 7e-9 off."""
    seen = []
    monkeypatch.setattr(model, "attention", lambda q, k, v, heads: seen.append(q) or q)
    pool = model.AttentionPool2D(3, 16, 2, 8)
    pool.to(dtype="float64")
    x = paddle.randn([2, 16, 3, 3]).astype("float64")
    x.stop_gradient = False
    pool(x)
    seen[0].sum().backward()
    expected = pool.q_proj.weight.numpy().sum(axis=1)[:, None, None] / 9  # [D, 1, 1]
    np.testing.assert_allclose(x.grad.numpy(), np.broadcast_to(expected, x.shape), rtol=1e-12)


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm2D"])
@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_frozen_norms_pass_on_the_gradient(kind, frozen):
    """What is trained below a frozen norm, as by LoRA: Paddle's layer norm leaves its weight out of the gradient."""
    paddle.seed(0)
    norm = getattr(model, kind)(8)
    norm.eval()
    norm.weight.set_value(paddle.rand([8]) + 0.5)
    x, upstream = paddle.randn([3, 8, 2, 2] if kind == "BatchNorm2D" else [3, 8]), []
    weights = paddle.randn(x.shape)
    for names in ([], frozen):
        for name in names:
            getattr(norm, name).stop_gradient = True
        leaf = x.clone().detach()
        leaf.stop_gradient = False
        (norm(leaf) * weights).sum().backward()
        upstream.append(leaf.grad.numpy())
    np.testing.assert_allclose(upstream[1], upstream[0], rtol=1e-5, atol=1e-6)


def test_the_attention_pool_computes_one_query():
    pool = model.AttentionPool2D(3, 64, 4, 32)
    lengths = []
    pool.q_proj.register_forward_post_hook(lambda _layer, _inputs, output: lengths.append(output.shape[1]))
    assert pool(paddle.rand([2, 64, 3, 3])).shape == [2, 32]
    assert lengths == [1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_compute_in_float32_for_half_precision(dtype):
    paddle.seed(1)
    for norm, shape in ((model.LayerNorm(64), [4, 64]), (model.BatchNorm2D(8), [2, 8, 4, 4])):
        norm.eval()
        x = (paddle.randn(shape) * 100).astype(dtype)
        y = norm(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.numpy(), norm(x.astype("float32")).astype(dtype).numpy())
    layer = model.LayerNorm(64)
    layer.to(dtype=dtype)
    assert layer(paddle.ones([2, 64]).astype(dtype)).dtype == getattr(paddle, dtype)


def test_norms_compute_in_float64_for_float64():
    """With Paddle's float32 epsilon the result would differ by 1e-8 for a variance near epsilon."""
    x = np.random.default_rng(0).standard_normal([4, 64]) * 1e-3
    norm = model.LayerNorm(64)
    norm.to(dtype="float64")
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(paddle.to_tensor(x)).numpy(), expected, rtol=1e-12, atol=1e-14)
    batch = model.BatchNorm2D(8)
    batch.eval()
    batch.to(dtype="float64")
    batch._variance.set_value(np.full(8, 1e-6))
    x = np.random.default_rng(0).standard_normal([2, 8, 3, 3])
    expected = x / np.sqrt(1e-6 + 1e-5)
    np.testing.assert_allclose(batch(paddle.to_tensor(x)).numpy(), expected, rtol=1e-12)


@BOTH
def test_trains(variant, device):
    """Every parameter gets a gradient, the running statistics move, and a step lowers the loss."""
    clip = presets.build(VARIANTS[variant])
    images, tokens = inputs(VARIANTS[variant])
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=clip.parameters())
    before = {name: buffer.numpy() for name, buffer in clip.named_buffers()}
    losses = []
    for _ in range(4):
        logits, _ = clip(images, tokens)
        loss = paddle.nn.functional.cross_entropy(logits, paddle.arange(3))
        loss.backward()
        losses.append(float(loss))
        assert all(parameter.grad is not None for parameter in clip.parameters())
        optimizer.step()
        optimizer.clear_grad()
    assert losses[-1] < losses[0]
    assert all((buffer.numpy() != before[name]).any() for name, buffer in clip.named_buffers())


@BOTH
def test_static_graph_with_a_dynamic_batch(device, clip, variant, tmp_path):
    config = VARIANTS[variant]
    resolution = config.image_resolution
    spec = [
        paddle.static.InputSpec([None, 3, resolution, resolution], "float32", "image"),
        paddle.static.InputSpec([None, config.context_length], "int64", "text"),
    ]
    images, tokens = inputs(config, 4)
    with paddle.no_grad():
        expected = clip(images, tokens)[0].numpy()
        static = paddle.jit.to_static(clip, input_spec=spec, full_graph=True)
        for batch in (4, 1, 3):
            found = static(images[:batch], tokens)[0].numpy()
            np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-4)
    paddle.jit.save(static, str(tmp_path / "clip"))
    loaded = paddle.jit.load(str(tmp_path / "clip"))
    np.testing.assert_allclose(loaded(images[:2], tokens)[0].numpy(), expected[:2], rtol=1e-4, atol=1e-4)


@BOTH
def test_to_static_as_users_call_it(clip, variant):
    """By default Paddle simulates the bytecode, and it cannot simulate all of Python."""
    images, texts = inputs(VARIANTS[variant])
    with paddle.no_grad():
        expected = clip(images, texts)[0].numpy()
        found = paddle.jit.to_static(clip, full_graph=False)(images, texts)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(
    not paddle.__version__.startswith("2.") and not paddle.device.is_compiled_with_cuda(),
    reason="Paddle 3 makes programs with flash attention on GPUs alone",
)
def test_half_precision_has_one_way_through_attention():
    """The program has no branch, though its number of tokens is free."""
    tokens = paddle.static.InputSpec([None, None, 128], "float16")

    def attend(q, k, v, mask):
        return model.attention(q, k, v, 2, mask)

    mask = paddle.static.InputSpec([None, None], "float16")
    static = paddle.jit.to_static(attend, input_spec=[tokens, tokens, tokens, mask], full_graph=True)
    program = str(static.concrete_program.main_program)
    assert "pd_op.if" not in program
    assert "conditional_block" not in program


@BOTH
def test_shapes_and_symmetry(clip, variant):
    images, tokens = inputs(VARIANTS[variant], 2)
    tokens = paddle.concat([tokens, tokens[:1]])
    with paddle.no_grad():
        per_image, per_text = clip(images, tokens)
        assert per_image.shape == [2, 3]
        np.testing.assert_array_equal(per_text.numpy(), per_image.numpy().T)
        image, text = clip.encode_image(images).numpy(), clip.encode_text(tokens).numpy()
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    np.testing.assert_allclose(per_image.numpy(), image @ text.T / 0.07, rtol=1e-4, atol=1e-4)


@BOTH
def test_images_of_another_size_are_refused(clip):
    with pytest.raises(ValueError, match=r"images are \[1, 3, 20, 20\]; this model takes \[N, 3, \d+, \d+\]: prepare"):
        clip.encode_image(paddle.zeros([1, 3, 20, 20]))


def test_weights_of_another_model_are_refused_and_change_nothing():
    clip, other = presets.build(VIT), presets.build(RESNET)
    before = {name: tensor.numpy() for name, tensor in clip.state_dict().items()}
    for load in (clip.set_state_dict, clip.load_dict, clip.set_dict):
        with pytest.raises(CheckpointError, match=r"missing: .*unexpected: .*misshapen: .*paddle-clip models"):
            load(other.state_dict())
    state = clip.state_dict()
    del state["visual.proj"]
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.proj \[128, 64\]"):
        clip.set_state_dict(state)
    for name, tensor in clip.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])


def test_state_dicts_are_cast_to_the_models_dtype():
    clip, other = presets.build(VIT), presets.build(VIT)
    state = {name: tensor.astype("float16") for name, tensor in other.state_dict().items()}
    assert clip.set_state_dict(state) == ([], [])
    for name, tensor in clip.state_dict().items():
        assert tensor.dtype == paddle.float32
        np.testing.assert_array_equal(tensor.numpy(), state[name].astype("float32").numpy())
    named = {tensor.name: tensor for tensor in clip.state_dict().values()}
    assert clip.set_state_dict(named, use_structured_name=False) == ([], [])
