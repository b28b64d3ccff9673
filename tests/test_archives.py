"""Reading and writing checkpoint files: every dtype and layout, and every bad file refused."""

import os
import pickle
import struct
import zipfile

import numpy as np
import paddle
import pytest

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import casting, pickles, reading, writing


def write(path, arrays):
    writing.write(path, arrays, lambda name: "keep", lambda checksums: {"crc32": checksums})


def rewrite_zip(source, target, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return target


def test_reads_what_torch_wrote(files, arrays_of):
    """All dtypes; strides, offsets, shared storages; 0-d, empty and nested tensors; parameters; storages on cuda:0."""
    expected = arrays_of("tensors")
    found = reading.read(files / "tensors.pt")
    assert found.keys() == expected.keys()
    assert b"cuda:0" in (files / "tensors.pt").read_bytes()
    bfloat16 = found.pop("bfloat16")
    assert bfloat16.dtype == np.uint16
    np.testing.assert_array_equal(casting.cast(bfloat16, "float32"), expected.pop("bfloat16"))
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name, strict=True)


@pytest.mark.parametrize("variant", ["resnet", "vit"])
def test_archive_and_state_dict_hold_the_same(files, arrays_of, variant):
    expected = arrays_of(variant)
    for file, extra in (
        (f"{variant}.pt", {"input_resolution", "context_length", "vocab_size"}),
        (f"{variant}_state_dict.pt", set()),
    ):
        found = reading.read(files / file)
        assert found.keys() - expected.keys() == extra
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("file", ["evil.pt", "evil.pdparams"])
def test_pickles_that_run_commands_are_refused(files, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"names (posix|os|nt)\.system"):
        reading.read(files / file)
    assert not os.path.exists("executed")


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "torch.load", "__builtin__.exec"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_unlisted_globals_are_refused(tmp_path, name, protocol):
    module, attribute = name.split(".")
    called = f"c{module}\n{attribute}\n".encode()
    if protocol == 4:
        called = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93"
    (tmp_path / "x.pdparams").write_bytes(b"\x80" + bytes([protocol]) + called + b"\x8c\x01a\x85R.")
    with pytest.raises(CheckpointError, match=f"names {name}"):
        reading.read(tmp_path / "x.pdparams")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello world", "is not a checkpoint"),
        (b"\x80\x02", "ends too early"),
        (b"\x80\x02}.", "holds no tensors"),
        (b"\x80\x02c", "cannot be read"),
        (b"\x80\x02c" + b"a" * 10_000_000, "cannot be read"),  # a name that does not end
        (b"\x80\x02K\x00" + b"q\x01cbuiltins\ntuple\nK\x00h\x01\x86\x85R" * 2000 + b".", "damaged"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),  # EXT1, an extension
        (b"\x80\x02I1\n.", "holds no tensors"),
        (b"\x80\x02(((.", "holds no tensors"),
        (b"\x80\x02\x8e" + b"\xff" * 8 + b".", "ends too early"),
        (b"\x80\x02h\x05.", "cannot be read"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "nested too deeply"),  # a dict that holds itself
        (b"\x80\x02" + b"(" * 1_000_001, "opcodes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "damaged or truncated .safetensors"),
        (
            struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[1000000000,8],"data_offsets":[0,4]}}     ',
            "out of bounds",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        reading.read(tmp_path / "x")


@pytest.mark.parametrize("file", ["vit.pt", "vit_state_dict.pt", "vit.pdparams", "vit.safetensors"])
def test_truncated_files_are_refused_at_any_length(files, file, tmp_path, paddle_files):
    content = (files if file.endswith("pt") else paddle_files).joinpath(file).read_bytes()
    for length in [1, 4, 30, 1000, *range(10_000, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            reading.read(tmp_path / "x")


@pytest.fixture(scope="module")
def paddle_files(files, tmp_path_factory):
    """A folder of the vision transformer's files in the forms we write."""
    folder = tmp_path_factory.mktemp("paddle")
    arrays = reading.read(files / "vit_state_dict.pt")
    write(folder / "vit.pdparams", arrays)
    write(folder / "vit.safetensors", arrays)
    return folder


def test_a_flipped_bit_is_found(files, tmp_path):
    content = bytearray((files / "vit.pt").read_bytes())
    reading.read(files / "vit.pt")
    with zipfile.ZipFile(files / "vit.pt") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        reading.read(tmp_path / "x.pt")


def test_missing_and_short_storages_are_refused(files, tmp_path):
    for change, message in (
        (lambda name, content: None if name.endswith("/data/3") else content, "storage 3 is missing"),
        (lambda name, content: content[:-2] if name.endswith("/data/3") else content, "storage 3 has"),
        (lambda name, content: None if name.endswith("data.pkl") else content, "not a PyTorch checkpoint"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "big-endian"),
    ):
        with pytest.raises(CheckpointError, match=message):
            reading.read(rewrite_zip(files / "vit_state_dict.pt", tmp_path / "x.pt", change))


def test_compressed_and_doubled_entries_are_refused(files, tmp_path):
    with pytest.raises(CheckpointError, match="compressed"):
        reading.read(rewrite_zip(files / "vit_state_dict.pt", tmp_path / "x.pt", compression=zipfile.ZIP_DEFLATED))
    rewrite_zip(files / "vit_state_dict.pt", tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(CheckpointError, match="doubled"):
        reading.read(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("count", "offset", "shape", "strides", "message"),
    [
        (4, 0, (2, 2), (2, 1), None),
        (4, 0, (2, 2), (3, 1), "beyond its storage"),
        (4, 3, (2,), (1,), "beyond its storage"),
        (4, 0, (1 << 60,), (0,), "beyond its storage"),
        (4, 0, (1 << 40, 1 << 40), (0, 0), "beyond its storage"),
        (4, -1, (2,), (1,), "impossible strides"),
        (4, 3, (2,), (-1,), "impossible strides"),
        (4, 0, (2, 2), (1,), "impossible strides"),
        (4, 0, (1,) * 33, (1,) * 33, "impossible strides"),
        (4, 0.5, (1,), (1,), "damaged"),
        (1 << 60, 0, (1,), (1,), "storage 0 has 16 bytes"),
        (4, 0, "ab", (1, 1), "damaged"),
    ],
)
def test_tensors_must_lie_in_their_storage(tmp_path, count, offset, shape, strides, message):
    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = plain("storage") + b"ctorch\nFloatStorage\n" + plain("0") + plain("cpu") + plain(count)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + plain(offset) + plain(shape) + plain(strides)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}" + plain("a") + tensor + b"\x89ccollections\nOrderedDict\n)RtRs.")
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())
    if message is None:
        np.testing.assert_array_equal(reading.read(tmp_path / "x.pt")["a"], [[0, 1], [2, 3]])
    else:
        with pytest.raises(CheckpointError, match=message):
            reading.read(tmp_path / "x.pt")


@pytest.mark.parametrize("length", [900, 1_000_000])
def test_long_names_cost_no_memory(tmp_path, length):
    """A long name above many references to one array would become as many long names, each of which is matched."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    array = pickle.dumps(np.ones(1, np.float32), protocol=2)[2:-1].replace(b"numpy._core", b"numpy.core")
    items = b"".join(plain(index) + b"h\xff" for index in range(20_000))
    content = b"\x80\x02}(" + plain("first") + array + b"q\xff" + plain("n" * length) + b"}(" + items + b"uu."
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="nested too deeply or too many"):
        reading.read(tmp_path / "x")


def test_reads_the_format_before_pytorch_1_6(files, tmp_path):
    expected = reading.read(files / "vit_state_dict.pt")
    found = reading.read(files / "legacy.pt")
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)
    content = (files / "legacy.pt").read_bytes()
    for length in (20, 200, 1000, 20_000, len(content) // 2, len(content) - 1):
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            reading.read(tmp_path / "x")


def test_reads_what_paddle_writes(tmp_path):
    state = {
        "a": paddle.rand([2, 3]),
        "b": paddle.rand([4]).astype("bfloat16"),
        "c": paddle.rand([]).astype("float64"),
        "d": paddle.ones([2, 2]).astype("float16"),
    }
    for protocol in (2, 4):
        for nested in (False, True):
            paddle.save({"model": state} if nested else state, str(tmp_path / "x.pdparams"), protocol=protocol)
            found = reading.read(tmp_path / "x.pdparams")
            for name, tensor in state.items():
                array = found[f"model.{name}" if nested else name]
                np.testing.assert_array_equal(array, tensor.numpy(), err_msg=name, strict=True)


def test_reads_fortran_order(tmp_path):
    fortran = pickle.dumps({"f": np.asfortranarray(np.arange(6.0).reshape(2, 3))}, protocol=2)
    (tmp_path / "y").write_bytes(fortran)
    np.testing.assert_array_equal(reading.read(tmp_path / "y")["f"], np.arange(6.0).reshape(2, 3))


def test_reads_safetensors(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1.5], np.float16)
    header = b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    header += b'"b":{"dtype":"F16","shape":[1],"data_offsets":[24,26]}}'
    content = struct.pack("<Q", len(header)) + header + a.tobytes() + b.tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    found = reading.read(tmp_path / "x.safetensors")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], a, strict=True)
    np.testing.assert_array_equal(found["b"], b, strict=True)
    (tmp_path / "x.safetensors").write_bytes(content.replace(b'"F16"', b'"X16"'))
    with pytest.raises(CheckpointError, match="b is of dtype X16; re-save it as F32"):
        reading.read(tmp_path / "x.safetensors")


def test_parse_makes_no_objects():
    content = pickle.dumps({"key": (1, -2, 2.5, "text", b"bytes", None, True, [1, 2], 2**40)}, protocol=4)
    parsed = pickles.parse(content, "x")
    assert parsed.end == len(content)
    assert parsed.tree == {"key": (1, -2, 2.5, "text", b"bytes", None, True, [1, 2], 2**40)}
