"""Names and layouts: everything that a converter could forget."""

import re

import numpy as np
import pytest
from paddle import nn

from paddle_clip import CheckpointError, presets
from paddle_clip.checkpoints import dialects, reading
from paddle_clip.checkpoints.shapes import config_from_shapes, parameter_shapes
from variants import VARIANTS

BOTH = pytest.mark.parametrize("variant", sorted(VARIANTS))


@pytest.fixture
def state(files, variant):
    """OpenAI's state dict of a variant."""
    return reading.read(files / f"{variant}_state_dict.pt")


def check_every_tensor(state, variant):
    """Asserts that a state dict is converted as the built model's layers demand, whatever the converter's rules."""
    model = presets.build(VARIANTS[variant])
    linears = {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    converted = dialects.from_checkpoint(state)
    assert converted.config == VARIANTS[variant]
    assert converted.arrays.keys() == model.state_dict().keys()
    openai = {"._mean": ".running_mean", "._variance": ".running_var", "attn.in_proj.": "attn.in_proj_"}
    used = set()
    for name, array in converted.arrays.items():
        source = re.sub("|".join(map(re.escape, openai)), lambda match: openai[match[0]], name)
        expected = state[source].T if name in linears else state[source]
        np.testing.assert_array_equal(array, expected, err_msg=name, strict=True)
        used.add(source)
    assert sorted(state.keys() - used) == converted.dropped
    assert all(name.endswith("num_batches_tracked") for name in converted.dropped)


@BOTH
def test_every_tensor_arrives_bit_for_bit(state, variant):
    check_every_tensor(state, variant)


@BOTH
def test_transposed_is_every_linear_and_nothing_else(state, variant):
    model = presets.build(VARIANTS[variant])
    linears = {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    transposed = set()
    for name, array in state.items():
        rules = [rule for rule in dialects.OPENAI if re.fullmatch(re.escape(rule[0]).replace(r"\{\}", ".+"), name)]
        assert len(rules) <= 1, name
        if rules and rules[0][2]:
            transposed.add(dialects.to_paddle(name, array)[0])
    assert transposed == linears


@BOTH
def test_a_square_linear_left_untransposed_is_caught(state, variant, monkeypatch):
    """The comparison fails when the rule for a square weight forgets its transpose."""
    rules = [(theirs, ours, t and "out_proj" not in theirs) for theirs, ours, t in dialects.OPENAI]
    monkeypatch.setattr(dialects, "DIALECTS", [d._replace(rules=rules) for d in dialects.DIALECTS])
    dialects.from_checkpoint(state)  # the shapes say nothing
    with pytest.raises(AssertionError, match=r"out_proj\.weight"):
        check_every_tensor(state, variant)


@BOTH
def test_misfits_are_all_reported_at_once(state, variant):
    state = dict(state)
    del state["transformer.resblocks.1.ln_1.bias"]
    del state["transformer.resblocks.0.mlp.c_fc.weight"]
    state["visual.extra.weight"] = np.ones([2, 3], np.float32)
    state["transformer.resblocks.0.attn.in_proj_bias"] = np.ones(7, np.float32)
    with pytest.raises(CheckpointError) as error:
        dialects.from_checkpoint(state, "x.pt")
    message = str(error.value)
    config = VARIANTS[variant]
    width = config.transformer_width
    assert message.startswith(
        f"x.pt does not fit: 2 missing: transformer.resblocks.0.mlp.c_fc.weight [{width}, {4 * width}], "
        f"transformer.resblocks.1.ln_1.bias [{width}]; 1 unexpected: visual.extra.weight [2, 3]; "
        f"1 misshapen: transformer.resblocks.0.attn.in_proj.bias is [7], expected [{3 * width}]. "
    )
    assert "\n" not in message


@BOTH
def test_each_single_misfit_is_caught(state, variant):
    """Each tensor in turn is missing or misshapen, or one is extra."""
    converted = dialects.from_checkpoint(state).arrays
    dialects.from_checkpoint(converted)  # our own names are taken as they are
    for name, array in converted.items():
        with pytest.raises(CheckpointError):
            dialects.from_checkpoint({other: value for other, value in converted.items() if other != name})
        with pytest.raises(CheckpointError):
            dialects.from_checkpoint({**converted, name: np.zeros((*array.shape, 2), np.float32)})
    with pytest.raises(CheckpointError, match="1 unexpected"):
        dialects.from_checkpoint({**converted, "visual.proj2": array})


def test_other_models_are_refused_with_what_was_found():
    with pytest.raises(CheckpointError, match=r"ln_final\.weight is missing, among 1 tensors such as fc\.weight"):
        dialects.from_checkpoint({"fc.weight": np.ones([2, 2], np.float32)}, "resnet.pt")


def test_huge_layer_numbers_cost_nothing():
    with pytest.raises(CheckpointError):
        dialects.from_checkpoint({"transformer.resblocks.99999999999.ln_1.weight": np.ones(2, np.float32)})


@BOTH
def test_integers_are_not_weights(state, variant):
    for dtype in (np.int64, np.uint8, bool):
        state["ln_final.bias"] = state["ln_final.bias"].astype(dtype)
        with pytest.raises(CheckpointError, match=r"floating-point numbers: ln_final\.bias"):
            dialects.from_checkpoint(state)


@pytest.mark.parametrize("row", presets.PRESETS, ids=lambda row: row.name)
def test_full_size_names_and_shapes_are_openais(files, row):
    """Names, shapes, parameter count and sizes of OpenAI's own model at full size equal ours."""
    shapes = {}
    for line in (files / f"{row.file}.shapes").read_text().splitlines():
        name, *shape = line.split(" ")
        if not dialects.DROPPED.fullmatch(name):
            shape = tuple(int(size) for size in shape if size)
            name, array = dialects.to_paddle(name, np.broadcast_to(np.float32(0), shape))
            shapes[name] = array.shape
    assert shapes == parameter_shapes(row.config)
    assert config_from_shapes(shapes) == row.config
    statistics = ("._mean", "._variance")
    assert row.parameters == sum(np.prod(shape, dtype=int) for n, shape in shapes.items() if not n.endswith(statistics))
