"""What stands beside the weights is left out: objects of any class, tensors of other dtypes, whole modules.

From winycg/CLIP-KD#20, mlfoundations/open_clip#966 and #1078, m1k2zoo/negbench#9 (training checkpoints),
openai/CLIP#205, zer0int/CLIP-fine-tune#16 (whole models), openai/CLIP#284 (Lightning).
"""

import argparse
import collections
import datetime
import enum
import functools
import pathlib
import pickle
import random

import numpy as np
import paddle
import pytest
import torch

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import dialects, reading
from paddle_clip.checkpoints.conversion import check
from paddle_clip.checkpoints.shapes import parameter_shapes
from variants import TINY

CONFIG = TINY["tiny_vit"]


class Mode(enum.Enum):
    TRAIN = "train"


class Outer:
    class Inner:
        """Protocols before 4 find it by `getattr`."""


class WithKeywords:
    def __new__(cls, *args, **keywords):
        return object.__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"b": 2}


class Ring:
    """An object that holds itself."""

    def __init__(self):
        self.rest = {"ring": [self]}


class Module(torch.nn.Module):
    pass


OBJECTS = {
    "numpy": [np.float64(0.5), np.str_("a"), np.arange(3.0), np.zeros((0, 3)), np.array([{}, None], object)],
    "numpy's dtypes": [np.zeros(2, ">f4"), np.zeros(2, "c8"), np.zeros(2, [("a", "f4")]), np.dtype("f4"), np.float32],
    "random": [np.random.default_rng(0), np.random.RandomState(0), random.getstate()],
    "objects": [argparse.Namespace(a=1), pathlib.Path("a"), Mode.TRAIN, Outer.Inner(), WithKeywords(), Ring()],
    "times": [datetime.datetime(2024, 1, 1), datetime.timedelta(1), datetime.timezone.utc],
    "sets": [{1, 2}, frozenset("ab"), collections.defaultdict(list, a=[1]), collections.deque([1]), {1: 1, "1": 2}],
    "bytes": [b"abc", b"", bytearray(b"abc"), "\0\n\ud7ff'\"\\", 2**3000, -(2**70), 1 + 2j, float("nan")],
    "keys": [{(1, 2): 3}, {None: 1}, {1.5: 2}, {b"a": 1}, {True: 1}],
    "functions": [functools.partial(int, base=2), int, slice(1, 2), range(3), ..., NotImplemented, ValueError("a")],
    "torch": [torch.Size([2, 3]), torch.float32, torch.device("cpu"), torch.strided, torch.nn.functional.relu],
    "deep": [functools.reduce(lambda inner, _: (inner,), range(200), ())],
}
TENSORS = {
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "uint16": lambda tensor: tensor.to(torch.uint16),
    "int8": lambda tensor: tensor.to(torch.int8),
}
FORMS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def arrays():
    """{OpenAI's name: array} of a small model."""
    random = np.random.default_rng(0)
    shapes = parameter_shapes(CONFIG)
    translated = (dialects.to_openai(n, random.normal(0, 0.1, s).astype(np.float32)) for n, s in shapes.items())
    return {name: np.array(array, order="C") for name, array in translated}


@pytest.fixture(scope="module")
def state(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


def module_of(tree):
    """Modules nested as the dots of the names tell."""
    made = Module()
    for part in dict.fromkeys(name.split(".")[0] for name in tree):
        inner = {name[len(part) + 1 :]: value for name, value in tree.items() if name.startswith(f"{part}.")}
        if inner:
            made.add_module(part, module_of(inner))
        else:
            made.register_parameter(part, torch.nn.Parameter(tree[part]))
    return made


@FORMS
def test_objects_in_torch_files(arrays, state, tmp_path, is_zip):
    saved = {"other": OBJECTS, "state_dict": state}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    report, _ = check(tmp_path / "x.pt")
    assert (report.prefix, report.tensors) == ("state_dict.", len(arrays))
    assert report.ignored == len(OBJECTS["numpy"]) + 3 + 1  # three arrays, and RandomState's
    found = reading.read(tmp_path / "x.pt")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"state_dict.{name}"], array, err_msg=name, strict=True)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_in_pickles(arrays, tmp_path, protocol):
    objects = {key: value for key, value in OBJECTS.items() if key != "torch"}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"other": objects, "model": arrays}, protocol=protocol))
    found = reading.read(tmp_path / "x.pdparams")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"model.{name}"], array, err_msg=name, strict=True)
    assert check(tmp_path / "x.pdparams")[0].tensors == len(arrays)


def test_objects_in_what_paddle_saves(arrays, tmp_path):
    tensors = {name: paddle.to_tensor(array) for name, array in arrays.items()}
    paddle.save({"model": tensors, "best": np.float32(0.5), "args": OBJECTS["objects"]}, str(tmp_path / "x.pdparams"))
    assert check(tmp_path / "x.pdparams")[0].ignored == 1


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_protocols(protocol):
    """They spell numbers and strings in text; the file of such a pickle is not recognised as a checkpoint."""
    value = {"a": ["b'\"\\\n\u20ac", 1, True, -(2**40), 2.5, None, ()], "c": {"d": [1]}}
    assert reading.pickles.parse(pickle.dumps(value, protocol=protocol), "x").tree == {**value, "a": list(value["a"])}
    python_2 = b"(dp0\nS'a\\x00\\'\\n\\\\'\np1\n(lp2\nI1\naL5L\nas(S'k'\nV\\u20ac\ntp3\n0."
    assert reading.pickles.parse(python_2, "x").tree == {"a\0'\n\\": [1, 5]}


@FORMS
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_weights(state, tmp_path, kind, is_zip):
    path, other = tmp_path / "x.pt", TENSORS[kind](torch.zeros(2, 3))
    torch.save({"state_dict": state, "other": other}, path, _use_new_zipfile_serialization=is_zip)
    assert check(path)[0].ignored == 1
    weight = TENSORS[kind](state["visual.proj"])
    torch.save({**state, "visual.proj": weight}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=f"floating-point numbers: visual.proj is {kind}"):
        check(path)


@FORMS
def test_whole_modules(state, tmp_path, is_zip):
    """A module's weights get the names of its state dict; what the state dict leaves out is left out."""
    model = module_of(state)
    model.register_buffer("mask", torch.zeros(4), persistent=False)
    model.register_buffer("count", torch.zeros(4))
    model.attribute, model.tied = torch.zeros(4), model.visual
    torch.save(model, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    found = reading.read(tmp_path / "x.pt")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name, strict=True)


@FORMS
@pytest.mark.parametrize("copied", [True, False])
def test_lightning(state, tmp_path, is_zip, copied):
    """The state dict is the model; the one among the hyper-parameters may have its weights of before the training."""
    model = module_of({name: tensor + 1 if copied else tensor for name, tensor in state.items()})
    saved = {"hyper_parameters": {"model": model}, "state_dict": {f"clip.{n}": t for n, t in state.items()}}
    torch.save(saved, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    report, _ = check(tmp_path / "x.ckpt")
    assert (report.prefix, report.ignored) == ("state_dict.clip.", len(state))


def test_the_same_weights_twice(state, tmp_path):
    torch.save({"model": module_of(state), "state_dict": state}, tmp_path / "x.pt")
    assert check(tmp_path / "x.pt")[0].prefix == "state_dict."
    torch.save({"a": state, "b": {name: tensor.clone() for name, tensor in state.items()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"several models: a\.\*, b\.\*"):
        check(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "name", ["builtins.exec", "subprocess.Popen", "torch.os.system", "torch.hub.load", "numpy.testing.runstring"]
)
def test_what_could_run_code_is_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    called = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93"
    for opcodes in (called + b"\x8c\1a\x85R.", b"(" + called + b"\x8c\1ao."):
        (tmp_path / "x.pdparams").write_bytes(b"\x80\x04" + opcodes)
        with pytest.raises(CheckpointError, match=f"names {name}, .* could run code"):
            reading.read(tmp_path / "x.pdparams")
