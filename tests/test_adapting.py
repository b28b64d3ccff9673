"""What fine-tuning changes: frozen layers, LoRA, recomputation, interpolation."""

import contextlib

import numpy as np
import paddle
import pytest

import paddle_clip
from paddle_clip import CheckpointError, adapting, finetune, presets
from paddle_clip.model import ResidualAttentionBlock
from variants import state_of

CONFIGS = {
    "vit": presets.CLIPConfig(8, 32, 2, 64, 16, 64, 1, 2, 12),
    "resnet": presets.CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 2, 12),
    "chinese": presets.CLIPConfig(8, 32, 2, 64, 16, 64, 1, 2, 12, 21128, text_tower="bert"),
}
MERGED_ERROR = 2e-6  # of features around 1; 7e-7 was measured
ARGUMENTS = {"epochs": 2, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-2}


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    paddle.seed(1)
    return presets.build(CONFIGS[request.param])


@pytest.fixture
def vit():
    paddle.seed(1)
    return presets.build(CONFIGS["vit"])


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, [32, 32, 3], dtype=np.uint8), f"thing number {index}") for index in range(12)]


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_frozen_layers_stay(vit, pairs):
    before = state_of(vit)
    freeze = ["text", "visual.conv1", "visual.transformer.resblocks.0", "visual.proj"]
    finetune(vit, pairs, freeze=freeze, **ARGUMENTS)
    kept = before.keys() - changed(before, state_of(vit))
    names = {name for name in before if not name.startswith("visual.") and name != "logit_scale"}
    names |= {name for name in before if name.startswith("visual.transformer.resblocks.0.")}
    assert kept == names | {"visual.conv1.weight", "visual.proj"}
    assert not any(parameter.stop_gradient for parameter in vit.parameters())


def test_lora_changes_linear_layers_alone_and_is_merged(model, pairs):
    before, layers = state_of(model), dict(model.named_sublayers())
    finetune(model, pairs, lora=2, **ARGUMENTS)
    linear = {f"{name}.weight" for name, layer in layers.items() if type(layer) is paddle.nn.Linear}
    assert len(linear) in (16, 12, 20)  # of two towers' blocks, of one's and the attention pool, of BERT
    after = state_of(model)
    assert changed(before, after) == linear | {"logit_scale"}
    for name in linear:
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-4) <= 2, name
    assert dict(model.named_sublayers()) == layers


def test_the_merged_model_is_the_one_that_was_trained(model):
    model.eval()
    images, tokens = paddle.randn([2, 3, 32, 32]), model.tokenize(["a", "a thing"])
    with adapting.adapted(model, lora=3) as trained, paddle.no_grad():
        for parameter in trained:
            parameter.set_value(0.1 * paddle.randn(parameter.shape))
        expected = model.encode_image(images).numpy(), model.encode_text(tokens).numpy()
        merged = adapting.merged_state(model)
    found = model.encode_image(images).numpy(), model.encode_text(tokens).numpy()
    for ours, theirs in zip(found, expected):
        assert np.abs(ours - theirs).max() < MERGED_ERROR * max(1, np.abs(theirs).max())
    assert not changed(state_of(model), merged)


def test_lora_leaves_a_frozen_tower(vit, pairs):
    before = state_of(vit)
    finetune(vit, pairs, lora=2, freeze="image", **ARGUMENTS)
    assert all(not name.startswith("visual.") for name in changed(before, state_of(vit)))


class Killed(BaseException):
    """An end as sudden as a signal's."""


def test_a_resumed_lora_is_bit_identical(vit, pairs, tmp_path):
    def begun():
        paddle.seed(1)
        return presets.build(CONFIGS["vit"])

    def kill(step):
        if step.step == 4:
            raise Killed

    finetune(vit, pairs, lora=2, **ARGUMENTS)
    arguments = {**ARGUMENTS, "lora": 2, "output": tmp_path / "x.pdparams"}
    with contextlib.suppress(Killed):
        finetune(begun(), pairs, on_step=kill, **arguments)
    merged, _ = paddle_clip.load(tmp_path / "x.checkpoint.safetensors")  # a model like any other
    assert changed(state_of(merged), state_of(begun()))
    paddle.seed(2)
    with pytest.raises(ValueError, match="of another training: weights was SHA-256"):
        finetune(presets.build(CONFIGS["vit"]), pairs, resume=True, **arguments)
    resumed = begun()
    assert finetune(resumed, pairs, resume=True, **arguments)[0].step == 4
    assert not changed(state_of(resumed), state_of(vit))


def test_recomputation_changes_no_bit_and_computes_blocks_again(vit, pairs, monkeypatch):
    before = state_of(vit)
    calls = []
    forward = ResidualAttentionBlock.forward
    monkeypatch.setattr(
        ResidualAttentionBlock,
        "forward",
        lambda *arguments, **options: (calls.append(1), forward(*arguments, **options))[1],
    )
    arguments = {**ARGUMENTS, "epochs": 1, "batch_size": 12, "accumulate": 1}
    finetune(vit, pairs, **arguments)
    expected, once = state_of(vit), len(calls)
    vit.set_state_dict(before)
    finetune(vit, pairs, recompute=True, **arguments)
    assert not changed(state_of(vit), expected)
    assert (once, len(calls) - once) == (4, 8)
    assert "forward" not in vars(vit.transformer.resblocks[0])


def test_recomputation_of_a_resnet(pairs):
    trained = []
    for recompute in (False, True):
        paddle.seed(1)
        trained.append(presets.build(CONFIGS["resnet"]))
        finetune(trained[-1], pairs, recompute=recompute, **ARGUMENTS)
    assert not changed(*map(state_of, trained))


def test_interpolation(vit):
    paddle.seed(2)
    other = presets.build(CONFIGS["vit"])
    before, after = state_of(vit), state_of(other)
    for alpha in (0, 0.25, 1):
        between = state_of(paddle_clip.interpolate(vit, other, alpha))
        for name, array in between.items():
            expected = (1 - alpha) * before[name] + alpha * after[name]
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    assert not changed(before, state_of(vit))
    assert not changed(after, state_of(other))
    with pytest.raises(ValueError, match="alpha=2; it must be between 0"):
        paddle_clip.interpolate(vit, other, 2)
    with pytest.raises(CheckpointError, match="interpolate a model and what was fine-tuned from it"):
        paddle_clip.interpolate(vit, presets.build(CONFIGS["resnet"]))
