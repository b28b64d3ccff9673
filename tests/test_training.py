"""Fine-tuning: gradients of large batches, schedule, frozen towers, checkpoints, and refusals."""

import contextlib
import json
import math
import os
import sys
import types

import numpy as np
import paddle
import pytest
from conftest import DEVICES
from PIL import Image
from safetensors.numpy import save_file

import paddle_clip
from paddle_clip import CheckpointError, ContrastiveLoss, distributed, finetune, presets, resumption, training
from paddle_clip.checkpoints import reading, writing
from paddle_clip.checkpoints.files import crc32_of_array
from variants import RESNET, SMALL, VARIANTS, VIT, assert_equal, state_of

GRADIENT_ERROR = 2e-5  # relative to a tensor's largest gradient, as sums have another order; 4e-6 was measured
SMALL_RESNET = presets.CLIPConfig(8, 32, (1, 1, 1, 1), 8, None, 64, 1, 1, 12)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture
def model():
    paddle.seed(1)
    return presets.build(SMALL)


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    names = [list(COLOURS)[index % 4] for index in range(14)]
    images = [np.uint8(np.clip(random.normal(COLOURS[name], 20, [32, 32, 3]), 0, 255)) for name in names]
    return [(image, f"a {name} thing, number {index}") for index, (image, name) in enumerate(zip(images, names))]


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("freeze", [None, "image", "text"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_accumulated_gradients_are_those_of_the_whole_batch(variant, freeze):
    config = VARIANTS[variant]
    model = presets.build(config)
    model.eval()
    images = paddle.randn([6, 3, config.image_resolution, config.image_resolution])
    tokens = paddle.randint(1, config.vocab_size, [6, config.context_length])

    def gradients(size):
        parts = [(images[start : start + size], tokens[start : start + size]) for start in range(0, 6, size)]
        loss = training.backward(model, ContrastiveLoss(), parts, freeze)
        found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
        model.clear_gradients()
        return loss, found

    loss, at_once = gradients(6)
    assert at_once.keys() == {name for name, _ in model.named_parameters() if tower_of(name) != freeze}
    assert np.abs(at_once["logit_scale"]) > 1e-3  # it does not pass by being 0
    for size in (2, 3):
        part_loss, parts = gradients(size)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert parts.keys() == at_once.keys()
        for name, expected in at_once.items():
            scale = max(np.abs(expected).max(), 1e-4)  # the gradient of a key's bias is 0 but for rounding
            assert np.abs(parts[name] - expected).max() / scale < GRADIENT_ERROR, name


def tower_of(name):
    return "neither" if name == "logit_scale" else "image" if name.startswith("visual.") else "text"


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(model, pairs):
    with paddle.no_grad():
        model.visual.proj.set_value(paddle.full_like(model.visual.proj, math.nan))
    before = state_of(model)
    with pytest.raises(FloatingPointError, match=r"the loss is nan\. Try a lower learning rate"):
        finetune(model, pairs, batch_size=4)
    assert_equal(before, state_of(model))


# ------------------------------------------------------------------------------------------------------------ the loop


def test_training_learns_what_the_captions_say(model, pairs, tmp_path):
    arguments = {"epochs": 30, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-3}
    four = [(image, caption.partition(",")[0]) for image, caption in pairs[:4]]
    history = finetune(model, four, tmp_path / "x.pdparams", **arguments)
    assert [step.step for step in history] == list(range(1, 31))
    assert history[0].steps == 30
    assert history[-1].epoch == 30
    assert history[0].loss > 1
    assert history[-1].loss < 0.1
    assert os.listdir(tmp_path) == ["x.pdparams"]
    loaded, _ = paddle_clip.load(tmp_path / "x.pdparams")
    assert_equal(state_of(model), state_of(loaded))


def test_rising_and_falling():
    rates = [training.schedule(step, 10, 2.0, 0.4) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[7] == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[9] < 0.2
    assert training.schedule(0, 10, 2.0, 0) == 2.0
    assert training.schedule(9, 10, 2.0, 1) == 2.0


def test_the_rate_is_the_optimisers(model, pairs, monkeypatch):
    rates = []
    step = paddle.optimizer.AdamW.step
    monkeypatch.setattr(paddle.optimizer.AdamW, "step", lambda self: (rates.append(self.get_lr()), step(self))[1])
    history = finetune(model, pairs, epochs=2, batch_size=4, learning_rate=1e-4)
    assert rates == [step.learning_rate for step in history]
    assert rates == [training.schedule(step, 6, 1e-4, 0.1) for step in range(6)]


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_what_weight_decay_applies_to(config):
    named = dict(presets.build(config).named_parameters())
    kept = {name for name, parameter in named.items() if not training.decays(parameter)}
    gains_and_biases = {name for name in named if name.endswith(".bias") or ".ln_" in name or name.startswith("ln_")}
    gains_and_biases |= {name for name in named if ".bn" in name or ".downsample.1." in name}
    assert kept == gains_and_biases | {"logit_scale"} | (named.keys() & {"visual.class_embedding"})
    assert {
        "text_projection",
        "token_embedding.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    } <= named.keys() - kept


def test_weight_decay_shrinks_matrices_alone(model, pairs):
    before = state_of(model)
    optimizer = training._optimizer(model.parameters(), 0.5, None)
    optimizer.set_lr(0.1)
    for parameter in model.parameters():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if before[name].ndim > 1 else 1
        np.testing.assert_allclose(parameter.numpy(), factor * before[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("freeze", "trained"), [("image", "text"), ("text", "image")])
def test_a_frozen_tower_stays(model, pairs, freeze, trained):
    model.encode_image(paddle.randn([1, 3, 32, 32])).sum().backward()  # gradients that were there before
    model.encode_text(paddle_clip.tokenize("a", 12)).sum().backward()
    before = state_of(model)
    finetune(model, pairs, batch_size=2, accumulate=2, freeze=freeze, learning_rate=1e-3)
    changed = {name for name, value in state_of(model).items() if not np.array_equal(value, before[name])}
    assert changed == {name for name in before if tower_of(name) in (trained, "neither")}


def test_batch_norms_keep_their_statistics_and_learn_their_gains(pairs):
    paddle.seed(1)
    model = presets.build(SMALL_RESNET)
    before = state_of(model)
    finetune(model, pairs, batch_size=4, learning_rate=1e-3)
    after = state_of(model)
    for name in before:
        is_statistic = name.endswith(("._mean", "._variance"))
        assert np.array_equal(before[name], after[name]) == is_statistic, name


def test_batch_norms_take_the_statistics_of_batches_if_asked(pairs, tmp_path):
    """A resumed training has the same to the bit, and a frozen tower keeps its own."""

    def trained(output, of=pairs, **arguments):
        paddle.seed(1)
        model = presets.build(SMALL_RESNET)
        given = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "train_norms": True, **arguments}
        finetune(model, of, tmp_path / output, **given)
        assert not model.visual.bn1.training
        return model

    paddle.seed(1)
    before = presets.build(SMALL_RESNET)
    images = paddle.stack([paddle_clip.image_transform(32)(image) for image, _ in pairs[:4]])
    with paddle.no_grad():
        expected = 0.1 * before.visual.conv1(images).mean(axis=[0, 2, 3])  # the averages begin at 0
    found = trained("one.pdparams", pairs[:4], epochs=1).visual.bn1._mean
    np.testing.assert_allclose(found, expected, atol=1e-6)

    whole = trained("whole.pdparams")
    with pytest.raises(Killed):
        trained("x.pdparams", on_step=killed_at(3), save_every=2)
    assert_equal(state_of(trained("x.pdparams", resume=True, save_every=2)), state_of(whole))
    frozen = trained("frozen.pdparams", freeze="image")
    assert_equal(state_of(frozen.visual), state_of(before.visual))


def test_the_temperature_stays_below_100(model, pairs):
    with paddle.no_grad():
        model.logit_scale.set_value(paddle.to_tensor(9.0))
    history = finetune(model, pairs, batch_size=4)
    assert history[0].logit_scale == pytest.approx(math.log(100))


def test_gradients_are_clipped(model, pairs):
    norms = {}
    for clip_norm in (None, 1e-3):
        paddle.seed(1)
        model = presets.build(SMALL)
        optimizer = training._optimizer(model.parameters(), 0.0, clip_norm)
        loss = model.encode_image(paddle.randn([2, 3, 32, 32])).sum() * 100
        loss.backward()
        optimizer.set_lr(0.1)
        optimizer.step()
        moments = (value for key, value in optimizer.state_dict().items() if "moment1" in key)
        norms[clip_norm] = math.sqrt(sum((moment.numpy() ** 2).sum() for moment in moments)) / (
            1 - training.ADAM_BETAS[0]
        )
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None] > 1


def test_the_log_has_every_step(model, pairs, monkeypatch, tmp_path):
    logged = []

    class LogWriter(contextlib.nullcontext):
        def __init__(self, logdir):
            super().__init__(self)
            logged.append(logdir)

        def add_scalar(self, *arguments):
            logged.append(arguments)

    monkeypatch.setitem(sys.modules, "visualdl", types.SimpleNamespace(LogWriter=LogWriter))
    history = finetune(model, pairs, batch_size=7, logdir=tmp_path)
    assert logged[0] == str(tmp_path)
    assert logged[4:] == [(name, getattr(history[1], name), 2) for name in ("loss", "learning_rate", "logit_scale")]
    monkeypatch.setitem(sys.modules, "visualdl", None)
    with pytest.raises(ImportError, match="pip install visualdl"):
        finetune(model, pairs, batch_size=7, logdir=tmp_path)


def test_each_epoch_is_another_order_and_nothing_is_drawn_twice():
    def drawn(seed):
        every = training._drawn(range(10), 6, 4, seed, distributed.Ranks())  # two steps to an epoch of ten
        return [every[index] for index in range(len(every))]

    epochs = [drawn(3)[first : first + 8] for first in (0, 8, 16)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn(3) == drawn(3) != drawn(4)


def test_without_shuffling_each_epoch_takes_the_pairs_in_their_order(model, pairs):
    def losses(pairs, **arguments):
        return [step.loss for step in finetune(model, pairs, batch_size=5, learning_rate=1e-30, **arguments)]

    reversed_in_pairs = [pairs[index ^ 1] for index in range(len(pairs))]  # another order within batches of 2, not of 5
    kept = losses(pairs, epochs=2, shuffle=False)
    assert kept[:2] == kept[2:] == losses(pairs[:5], shuffle=False) + losses(pairs[5:10], shuffle=False)
    assert losses(reversed_in_pairs, shuffle=False)[0] != kept[0] != losses(pairs)[0]
    of_ranks = [training._drawn(range(10), 4, 2, None, distributed.Ranks(rank, 2)) for rank in (0, 1)]
    slices = [[drawn[place] for place in range(8)] for drawn in of_ranks]
    assert slices == [[0, 1, 4, 5, 0, 1, 4, 5], [2, 3, 6, 7, 2, 3, 6, 7]]


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_does_not_tell_of_shuffling_is_resumed(model, pairs, monkeypatch):
    """Those of earlier versions; and they tell a frozen tower by its name alone."""
    told = []
    monkeypatch.setattr(training, "_require_alike", lambda ranks, settings: told.append(dict(settings)))
    for arguments in ({"freeze": "image"}, {"freeze": "image", "shuffle": False}):
        finetune(model, pairs, batch_size=7, **arguments)
    shuffled, in_order = told[0], told[2]
    earlier = {name: value for name, value in shuffled.items() if name != "in_order"}
    assert earlier["freeze"] == "image"
    assert resumption.differences(earlier, shuffled) == ""
    assert "in_order" in resumption.differences(earlier, in_order)


class Killed(BaseException):
    """An end as sudden as a signal's."""


def killed_at(number):
    def on_step(step):
        if step.step == number:
            raise Killed

    return on_step


ARGUMENTS = {"epochs": 2, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-3, "clip_norm": 1.0}


@pytest.mark.parametrize("killed", [3, 5])
def test_a_resumed_training_is_bit_identical(pairs, tmp_path, killed):
    """Six steps equal those before the checkpoint and, in a model of other weights and names, those after it."""
    paddle.seed(1)
    uninterrupted = presets.build(SMALL)
    expected = finetune(uninterrupted, pairs, tmp_path / "whole.pdparams", **ARGUMENTS)
    assert len(expected) == 6

    paddle.seed(1)
    with pytest.raises(Killed):
        finetune(presets.build(SMALL), pairs, tmp_path / "x.pdparams", on_step=killed_at(killed), **ARGUMENTS)
    assert sorted(os.listdir(tmp_path)) == ["whole.pdparams", "x.checkpoint.safetensors"]
    paddle.seed(2)
    other = presets.build(SMALL)
    history = finetune(other, pairs, tmp_path / "x.pdparams", resume=True, **ARGUMENTS)
    assert history == expected[3:]  # the checkpoint is that of the first epoch
    assert_equal(state_of(other), state_of(uninterrupted))
    assert (tmp_path / "x.pdparams").read_bytes() == (tmp_path / "whole.pdparams").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["whole.pdparams", "x.pdparams"]


@pytest.fixture
def unfinished(model, pairs, tmp_path):
    """The arguments of a training that was killed after its second step."""
    arguments = {**ARGUMENTS, "save_every": 2}
    with pytest.raises(Killed):
        finetune(model, pairs, tmp_path / "x.pdparams", on_step=killed_at(2), **arguments)
    return arguments


def test_a_checkpoint_is_a_model_and_holds_the_optimiser_by_our_names(model, unfinished, tmp_path):
    loaded, _ = paddle_clip.load(tmp_path / "x.checkpoint.safetensors")
    assert_equal(state_of(loaded), state_of(model))
    checkpoint = reading.read(tmp_path / "x.checkpoint.safetensors")
    assert json.loads(checkpoint.metadata["training"])["step"] == 2
    for name, parameter in model.named_parameters():
        for moment in ("moment1_0", "moment2_0"):
            assert list(checkpoint[f"optimizer.{name}.{moment}"].shape) == list(parameter.shape)


def test_the_last_good_checkpoint_survives_what_interrupts_the_next(model, pairs, unfinished, tmp_path, monkeypatch):
    file = tmp_path / "x.checkpoint.safetensors"
    before = file.read_bytes()

    def interrupt(*arguments):
        raise Killed

    monkeypatch.setattr(writing, "_compare", interrupt)
    with pytest.raises(Killed):
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_a_checkpoint_is_not_overwritten_unasked(model, pairs, unfinished, tmp_path):
    before = (tmp_path / "x.checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"x\.checkpoint\.safetensors is of an unfinished training: give resume=True"):
        finetune(model, pairs, tmp_path / "x.pdparams", **unfinished)
    assert (tmp_path / "x.checkpoint.safetensors").read_bytes() == before


def test_what_a_checkpoint_was_made_with_must_be_the_same(model, pairs, unfinished, tmp_path):
    with pytest.raises(ValueError, match=r"another training: batch_size was 2 and is 3, learning_rate was 0.001 and"):
        changed = {**unfinished, "batch_size": 3, "learning_rate": 0.1}
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **changed)
    pairs[3] = (pairs[3][0], "something else")
    with pytest.raises(ValueError, match="another training: pairs was 14 with SHA-256"):
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)


def test_damaged_and_foreign_checkpoints(model, pairs, unfinished, tmp_path):
    file = tmp_path / "x.checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)
    paddle_clip.save(model, file)
    with pytest.raises(CheckpointError, match="is not a checkpoint of a training"):
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)


def rewrite(file, change):
    """Writes a checkpoint again after a change of {name: array} and of what it tells, with right checksums."""
    checkpoint = reading.read(file)
    arrays = {name: np.array(array) for name, array in checkpoint.items()}
    metadata, state = dict(checkpoint.metadata), json.loads(checkpoint.metadata["training"])
    with_checksums = change(arrays, state) is not False
    metadata["training"] = json.dumps(state)
    checksums = {name: f"{crc32_of_array(array):08x}" for name, array in arrays.items()}
    metadata["crc32"] = json.dumps(checksums if with_checksums else {})
    del checkpoint
    save_file(arrays, file, metadata)


def drop(arrays, ending):
    del arrays[next(name for name in arrays if name.endswith(ending))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, state: None, None),
        (lambda arrays, state: False, "is not a checkpoint of a training"),
        (lambda arrays, state: state.update(step=7), "is of step 7, and the training has 6; delete it"),
        (lambda arrays, state: state.update(step=0), "is not a checkpoint of a training"),
        (lambda arrays, state: state.update(step=float("inf")), "is not a checkpoint of a training"),
        (lambda arrays, state: state.update(step="2"), "is not a checkpoint of a training"),
        (lambda arrays, state: state.update(scaler={"scale": 1}), "is not a checkpoint of a training"),
        (lambda arrays, state: state.update(settings=[[[], 1]]), "is not a checkpoint of a training"),
        (lambda arrays, state: drop(arrays, ".moment1_0"), "1 missing"),
        (lambda arrays, state: drop(arrays, "visual.proj"), "visual.proj"),
        (
            lambda arrays, state: arrays.update({"optimizer.logit_scale.moment1_0": np.zeros(3, np.float32)}),
            "misshapen",
        ),
        (lambda arrays, state: arrays.update({"optimizer.logit_scale.moment1_0": np.array(1)}), "1 misshapen"),
        (lambda arrays, state: arrays.update({"optimizer.x.moment1_0": np.zeros(1, np.float32)}), "1 unexpected"),
    ],
)
def test_forged_checkpoints(model, pairs, unfinished, tmp_path, change, message):
    """What fits neither the model nor the training is refused, and leaves the model as it was."""
    rewrite(tmp_path / "x.checkpoint.safetensors", change)
    before = state_of(model)
    if not message:
        assert finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)[0].step == 3
        return
    with pytest.raises(CheckpointError, match=message):
        finetune(model, pairs, tmp_path / "x.pdparams", resume=True, **unfinished)
    assert_equal(state_of(model), before)


def test_resuming_without_a_checkpoint_starts_anew(model, pairs, tmp_path):
    assert finetune(model, pairs, tmp_path / "x.pdparams", resume=True, batch_size=7)[0].step == 1


# ----------------------------------------------------------------------------------------------------- mixed precision


class Scaler:
    """A stand-in for Paddle's, which needs a GPU; it scales by a power of two, which changes no bit of the result."""

    def __init__(self, enable):
        self.enabled, self.count = enable, 0

    def scale(self, loss):
        return loss * 1024

    def step(self, optimizer):
        for parameter in optimizer._parameter_list:
            if parameter.grad is not None:
                parameter.grad.set_value(parameter.grad / 1024)
        optimizer.step()

    def update(self):
        self.count += 1

    def state_dict(self):
        return {"scale": np.float32([1024]), "incr_count": self.count}

    def load_state_dict(self, state):
        assert state["scale"][0] == 1024
        self.count = state["incr_count"]


def test_mixed_precision_scales_the_loss_and_keeps_the_state(pairs, tmp_path, monkeypatch):
    def trained(name, **arguments):
        paddle.seed(1)
        model = presets.build(SMALL)
        with contextlib.suppress(Killed):
            finetune(model, pairs, tmp_path / name, batch_size=2, accumulate=2, epochs=2, **arguments)
        return model

    expected = state_of(trained("expected.pdparams"))
    contexts, scalers = [], []

    def auto_cast(**arguments):
        contexts.append(arguments)
        return contextlib.nullcontext()

    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    monkeypatch.setattr(paddle.amp, "GradScaler", lambda enable: (scalers.append(Scaler(enable)), scalers[-1])[1])
    trained("x.pdparams", amp="float16", on_step=killed_at(3))
    assert_equal(state_of(trained("x.pdparams", amp="float16", resume=True)), expected)
    assert [(scaler.enabled, scaler.count) for scaler in scalers] == [(True, 3), (True, 6)]
    assert len(contexts) == 6 * 2 * 2 * 2  # steps, parts, towers, without gradients and with them
    assert all(context == {"enable": True, "dtype": "float16", "level": "O1"} for context in contexts)
    trained("y.pdparams", amp="bfloat16")
    assert not scalers[-1].enabled  # bfloat16 has float32's range
    assert contexts[-1]["dtype"] == "bfloat16"


@pytest.mark.parametrize("amp", training.HALF_DTYPES)
@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_mixed_precision_on_a_gpu(model, pairs, device, amp):
    history = finetune(model, pairs, batch_size=2, accumulate=2, epochs=20, learning_rate=1e-3, amp=amp)
    assert history[-1].loss < history[0].loss
    assert all(parameter.dtype == paddle.float32 for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 8, "accumulate": 2}, r"14 pairs do not fill one batch of 16 \(batch_size=8 x accumulate=2\)"),
        ({"batch_size": 0}, "batch_size=0; it must be at least 1"),
        ({"epochs": 0}, "epochs=0"),
        ({"accumulate": -1}, "accumulate=-1"),
        ({"save_every": 0}, "save_every=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1; it must be at least 0"),
        ({"seed": -1}, "seed=-1; it must be at least 0"),
        ({"clip_norm": 0}, "clip_norm=0; it must be above 0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0; it must be above 0"),
        ({"warmup": 100}, "warmup=100; it must be a share of all steps, between 0 and 1"),
        (
            {"freeze": "vision"},
            "freeze is 'vision'; choose image, text, or the name of a layer, such as ln_final, token_",
        ),
        ({"freeze": ["image", "text"]}, "leaves nothing to train"),
        ({"lora": 0}, "lora=0; it is a rank, at least 1, or None"),
        ({"amp": "float32"}, "amp is 'float32'; choose one of float16, bfloat16, or None"),
        ({"amp": "bfloat16"}, "amp='bfloat16' needs a GPU: on the CPU Paddle has no kernels for it"),
    ],
)
def test_arguments_out_of_range(model, pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        finetune(model, pairs, **arguments)


def test_the_model_must_be_float32(model, pairs):
    with pytest.raises(ValueError, match="fine-tuning takes float32"):
        finetune(model.to(dtype="float64"), pairs, batch_size=4)


def test_an_output_that_cannot_be_is_refused_before_the_training(model, pairs, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name, error, message in (
        ("none/x.pdparams", FileNotFoundError, "the folder of the output .* does not exist"),
        ("folder.pt", ValueError, "is not a file"),
        ("x.ckpt", CheckpointError, r"x.ckpt; choose a name that ends with \.pdparams"),
    ):
        output = tmp_path / name
        with pytest.raises(error, match=message):
            finetune(model, pairs, output, batch_size=4, on_step=lambda step: pytest.fail("it trained"))


def test_a_damaged_picture_of_the_validation_costs_no_epoch(model, pairs, tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    arguments = {"output": tmp_path / "x.pdparams", "batch_size": 7, "epochs": 2, "resume": True}
    arguments["validation"] = [*pairs[:3], (str(tmp_path / "x.png"), "broken")]
    with pytest.raises(ValueError, match=r"x.png as an image"):
        finetune(model, pairs, **arguments)
    Image.fromarray(pairs[0][0]).save(tmp_path / "x.png")
    steps = finetune(model, pairs, **arguments)
    assert (steps[0].step, steps[-1].epoch) == (len(pairs) // 7 + 1, 2)


def test_names_that_are_no_text(model, pairs, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.png")
    Image.fromarray(pairs[0][0]).save(path)
    pairs[0] = (str(path), pairs[0][1])
    assert len(finetune(model, pairs, batch_size=len(pairs))) == 1


def test_a_damaged_image_is_named(model, pairs, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    pairs[5] = (tmp_path / "broken.png", "broken")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image"):
        finetune(model, pairs, batch_size=14)
