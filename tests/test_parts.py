"""OpenAI's parts called alone, against OpenAI's own on PyTorch in float64: masks, tokens, layers, attention weights."""

import numpy as np
import paddle
import pytest
import torch
from transformers import CLIPModel

import paddle_clip
import parity
import reference
from paddle_clip import layers, presets
from paddle_clip.model import ResidualAttentionBlock
from variants import VARIANTS, VIT

BOTH = pytest.mark.parametrize("variant", sorted(VARIANTS))


def assert_same(ours, theirs):
    ours = ours.numpy() if isinstance(ours, paddle.Tensor) else ours
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    assert parity.difference(ours, theirs)[1] <= parity.FLOAT64_BOUND


@pytest.fixture(scope="module")
def models(files):
    """A function returning our model and OpenAI's of a variant, in float64."""

    def load(variant):
        path = files / f"{variant}.pt"
        return paddle_clip.load(path, "float64")[0], reference.load(str(path), "float64")

    return load


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def lnd(array):
    """Tokens as OpenAI's transformers take them: [B, L, D] -> [L, B, D]."""
    return torch.from_numpy(array).transpose(0, 1)


@BOTH
@torch.no_grad()
def test_text_transformer_and_its_blocks_are_causal_by_themselves(models, variant):
    """Prompt learning calls them: CoOp's text encoder gives its own tokens to `model.transformer`."""
    (ours, theirs), config = models(variant), VARIANTS[variant]
    x = numbers(2, config.context_length, config.transformer_width)
    assert_same(ours.transformer(paddle.to_tensor(x)), theirs.transformer(lnd(x)).transpose(0, 1))
    for our_block, their_block in zip(ours.transformer.resblocks, theirs.transformer.resblocks):
        assert_same(our_block(paddle.to_tensor(x)), their_block(lnd(x)).transpose(0, 1))
        attended, weights = our_block.attention(paddle.to_tensor(x))
        assert weights is None
        assert_same(attended, their_block.attention(lnd(x)).transpose(0, 1))


@torch.no_grad()
def test_vision_transformer_and_its_blocks_see_all_tokens(models):
    ours, theirs = models("vit")
    x = numbers(2, 10, VIT.vision_width)
    assert_same(ours.visual.transformer(paddle.to_tensor(x)), theirs.visual.transformer(lnd(x)).transpose(0, 1))
    for our_block, their_block in zip(ours.visual.transformer.resblocks, theirs.visual.transformer.resblocks):
        assert_same(our_block(paddle.to_tensor(x)), their_block(lnd(x)).transpose(0, 1))


@torch.no_grad()
def test_parts_of_the_resnet(models):
    ours, theirs = models("resnet")
    x = numbers(2, 3, 96, 96)
    their_maps = []
    for name in ("avgpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(theirs.visual, name).register_forward_hook(lambda _module, _inputs, output: their_maps.append(output))
    assert_same(ours.visual(paddle.to_tensor(x)), theirs.visual(torch.from_numpy(x)))
    states = ours.visual.hidden_states(paddle.to_tensor(x))
    for state, theirs_of_stage in zip(states, their_maps):
        assert_same(state, theirs_of_stage)
    assert len(states) == len(their_maps)
    assert_same(ours.visual.forward_features(paddle.to_tensor(x)), their_maps[-1])
    pooled = numbers(2, 16 * 32, 3, 3)
    assert_same(ours.visual.attnpool(paddle.to_tensor(pooled)), theirs.visual.attnpool(torch.from_numpy(pooled)))
    block = numbers(2, 64, 8, 8)
    assert_same(ours.visual.layer2[0](paddle.to_tensor(block)), theirs.visual.layer2[0](torch.from_numpy(block)))


@BOTH
@torch.no_grad()
def test_a_port_of_encode_text_line_by_line(models, variant):
    (ours, theirs), config = models(variant), VARIANTS[variant]
    tokens = parity.random_inputs(config)["tokens"]
    text = paddle.to_tensor(tokens)
    x = ours.token_embedding(text).astype(ours.dtype)
    x = x + ours.positional_embedding.astype(ours.dtype)
    x = ours.transformer(x)
    x = ours.ln_final(x).astype(ours.dtype)
    x = x[paddle.arange(x.shape[0]), text.argmax(axis=-1)] @ ours.text_projection
    assert_same(x, theirs.encode_text(torch.from_numpy(tokens)))


def test_hooks_see_all_tokens(models):
    ours, _ = models("vit")
    inputs, seen = parity.random_inputs(VIT), {}
    watched = {
        "visual.transformer": [4, 10, 128],
        "visual.transformer.resblocks.2": [4, 10, 128],
        "transformer": [4, 12, 192],
        "transformer.resblocks.1": [4, 12, 192],
        "ln_final": [4, 12, 192],
    }
    for name, layer in ours.named_sublayers():
        if name in watched:
            layer.register_forward_post_hook(lambda _l, _i, output, name=name: seen.update({name: output.shape}))
    ours.encode_image(paddle.to_tensor(inputs["images"]))
    ours.encode_text(paddle.to_tensor(inputs["tokens"]))
    assert seen == watched


@torch.no_grad()
def test_features_before_the_projection(models):
    ours, theirs = models("vit")
    images = parity.random_inputs(VIT)["images"]
    ours.visual.proj = theirs.visual.proj = None
    assert_same(ours.encode_image(paddle.to_tensor(images)), theirs.encode_image(torch.from_numpy(images)))
    with pytest.raises(ValueError, match=r"visual.proj is None"):
        paddle_clip.export(ours, "never")


@torch.no_grad()
@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_are_pytorchs(models, average):
    ours, theirs = models("vit")
    x, y = numbers(2, 12, 192), numbers(2, 7, 192, seed=1)
    options = {"need_weights": True, "average_attn_weights": average}
    block, their_block = ours.transformer.resblocks[1], theirs.transformer.resblocks[1]
    mask = their_block.attn_mask.double()
    expected = their_block.attn(*[lnd(x)] * 3, attn_mask=mask, **options)
    found = block.attention(paddle.to_tensor(x), **options)
    assert_same(found[0], expected[0].transpose(0, 1))
    assert_same(found[1], expected[1])
    assert found[1].shape == ([2, 12, 12] if average else [2, 3, 12, 12])
    found = block.attn(*[paddle.to_tensor(x)] * 3, attn_mask=ours.build_attention_mask(), **options)
    assert_same(found[1], expected[1])
    # Queries and keys of different tokens, for which the fused projection is cut.
    expected = their_block.attn(lnd(x), lnd(y), lnd(y), **options)
    found = block.attn(paddle.to_tensor(x), paddle.to_tensor(y), paddle.to_tensor(y), **options)
    assert_same(found[0], expected[0].transpose(0, 1))
    assert_same(found[1], expected[1])


@torch.no_grad()
def test_masks_are_additive(models):
    """A mask of 0 and -inf, or of any numbers, is added to the scores in place of the block's own mask."""
    ours, theirs = models("vit")
    block, their_block = ours.transformer.resblocks[0], theirs.transformer.resblocks[0]
    x = numbers(2, 12, 192)
    window = np.where(np.abs(np.subtract.outer(range(12), range(12))) > 2, -np.inf, 0.0)
    for mask in (window, numbers(12, 12, seed=2)):
        their_block.attn_mask = torch.from_numpy(mask)
        assert_same(block(paddle.to_tensor(x), paddle.to_tensor(mask)), their_block(lnd(x)).transpose(0, 1))
    np.testing.assert_array_equal(ours.build_attention_mask().numpy(), theirs.build_attention_mask().numpy())
    with pytest.raises(TypeError, match="give the additive form, 0 where a query may look and -inf elsewhere"):
        block(paddle.to_tensor(x), paddle.to_tensor(window == 0))


def test_hidden_states_are_hugging_faces(library_files):
    """The outputs of every layer of both towers, the patch tokens, and the text tokens that diffusion models read."""
    folder = library_files / "hugging_face"
    theirs = CLIPModel.from_pretrained(folder).double().eval()
    ours, _ = paddle_clip.load(folder / "model.safetensors", "float64")
    inputs = parity.random_inputs(VIT)
    images, tokens = paddle.to_tensor(inputs["images"]), paddle.to_tensor(inputs["tokens"])
    with torch.no_grad():
        vision = theirs.vision_model(torch.from_numpy(inputs["images"]), output_hidden_states=True)
        text = theirs.text_model(torch.from_numpy(inputs["tokens"]), output_hidden_states=True)
        patches = theirs.vision_model.post_layernorm(vision.last_hidden_state)
    states = ours.visual.hidden_states(images)
    assert len(states) == len(vision.hidden_states) == VIT.vision_layers + 1
    for found, expected in zip(states, vision.hidden_states):
        assert_same(found, expected)
    assert_same(ours.visual.forward_features(images), patches)
    states = ours.hidden_states(tokens)
    assert len(states) == len(text.hidden_states) == VIT.transformer_layers + 1
    for found, expected in zip(states, text.hidden_states):
        assert_same(found, expected)
    assert_same(ours.forward_features(tokens), text.last_hidden_state)
    assert_same(ours.encode_image(images), theirs.visual_projection(vision.pooler_output))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=sorted(VARIANTS))
def test_the_model_keeps_its_config(config):
    assert presets.build(config).config == config


class Adapter(paddle.nn.Layer):
    """A linear layer with a trained addition, as adapters put it in place of ours."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.added = paddle.nn.Linear(linear.weight.shape[0], linear.weight.shape[1])

    def forward(self, x):
        return self.linear(x) + self.added(x)


@BOTH
def test_programs_call_layers_that_are_not_ours(variant):
    """Programs read the weights of our own layers, but trace an adapter by calling it."""
    model = presets.build(VARIANTS[variant])
    block = model.transformer.resblocks[-1].attn
    block.in_proj = Adapter(block.in_proj)
    if variant == "resnet":
        model.visual.attnpool.v_proj = Adapter(model.visual.attnpool.v_proj)
    else:
        block = model.visual.transformer.resblocks[0].attn
        block.in_proj = Adapter(block.in_proj)
    model.eval()
    inputs = parity.random_inputs(VARIANTS[variant])
    images, tokens = inputs["images"].astype("float32"), inputs["tokens"]
    with paddle.no_grad():
        expected = [model.encode_image(paddle.to_tensor(images)), model.encode_text(paddle.to_tensor(tokens))]
    predictor = paddle_clip.compile(model, engine="paddle")
    for found, of_eager in zip((predictor.encode_image(images), predictor.encode_text(tokens)), expected):
        assert parity.difference(found, of_eager.numpy())[1] <= 1e-5


@pytest.mark.parametrize("watched", ["transformer", "transformer.resblocks.1", "transformer.resblocks.1.attn"])
def test_programs_run_hooks(watched):
    """A hook that changes what the last block computes changes what the program computes."""
    model = presets.build(VIT)
    model.eval()
    tokens = parity.random_inputs(VIT)["tokens"]
    layer = dict(model.named_sublayers())[watched]
    layer.register_forward_post_hook(lambda _l, _i, y: (2 * y[0], None) if isinstance(y, tuple) else 2 * y + 1)
    with paddle.no_grad():
        expected = model.encode_text(paddle.to_tensor(tokens)).numpy()
    found = paddle_clip.compile(model, engine="paddle").encode_text(tokens)
    assert parity.difference(found, expected)[1] <= 1e-5


def test_the_last_block_of_a_program_computes_one_token():
    """Traced programs compute the query of the token that is read, and no others."""
    block = ResidualAttentionBlock(64, 2, causal=True)
    block.eval()
    x, at = paddle.randn([3, 5, 64]), paddle.to_tensor([4, 0, 2])
    expected = layers.token(block(x), at)
    traced = paddle.jit.to_static(block.of_one, input_spec=[
        paddle.static.InputSpec([None, None, 64]), paddle.static.InputSpec([None], "int64")
    ], full_graph=True)  # fmt: skip
    found = traced(x, at)
    assert found.shape == [3, 1, 64]
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("window, size", [(2, (6, 8)), (2, (5, 8)), (2, (6, 7)), (1, (4, 4)), (3, (6, 6))])
def test_pools_are_paddles(window, size):
    x = paddle.randn([2, 3, *size])
    ours, theirs = layers.AvgPool2D(window)(x), paddle.nn.AvgPool2D(window)(x)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("width", [64, 10, 7])
def test_few_rows_computes_the_layer(width):
    layer = layers.linear(width, 8)
    layer.to(dtype="float64")
    x = paddle.to_tensor(numbers(3, 1, width))
    assert_same(layers.few_rows(layer, x), layer(x).numpy())


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_few_rows_round_like_pytorchs(rows):
    x, weight = numbers(rows, 2048).astype("float32"), numbers(2048, 256).astype("float32")
    exact = x.astype("float64") @ weight.astype("float64")
    ours = layers.project(paddle.to_tensor(x), paddle.to_tensor(weight)).numpy()
    theirs = torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(weight.T.copy())).numpy()
    assert np.abs(ours - exact).mean() < 1.3 * np.abs(theirs - exact).mean()


def test_few_rows_calls_what_is_watched_or_replaced():
    layer, seen = layers.linear(8, 4), []
    x = paddle.rand([2, 8])
    layer.register_forward_post_hook(lambda _layer, _inputs, output: seen.append(output))
    assert layers.few_rows(layer, x) is seen[0]
    assert layers.few_rows(paddle.nn.ReLU(), x - 1).numpy().max() == 0


def test_models_that_are_loaded_are_not_drawn():
    with layers.undrawn():
        blank = presets.clip_tiny()
    assert all(
        float(tensor.abs().max()) in (0, 1) for name, tensor in blank.state_dict().items() if name != "logit_scale"
    )
    drawn = presets.clip_tiny()  # the switch is back
    assert all(float(drawn.state_dict()[name].std()) > 0 for name in ("text_projection", "token_embedding.weight"))
    assert float(drawn.transformer.resblocks[0].attn.in_proj.weight.std()) > 0
