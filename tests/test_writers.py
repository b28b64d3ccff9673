"""Writing checkpoint files: reading them back with each library, and failures."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest
import safetensors.numpy
import torch
from conftest import ROOT

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import casting, reading, writing

FORMS = pytest.mark.parametrize("extension", [".pdparams", ".safetensors", ".pt"])


def write(path, arrays, dtype="keep", **arguments):
    writing.write(path, arrays, lambda name: dtype, lambda checksums: {"crc32": checksums, "note": "é"}, **arguments)


@FORMS
def test_reads_back_with_metadata(files, tmp_path, extension):
    arrays = reading.read(files / "vit_state_dict.pt")
    write(tmp_path / f"x{extension}", arrays)
    found = reading.read(tmp_path / f"x{extension}")
    assert found.metadata["note"] == "é"
    assert sorted(found) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)
    assert writing.verify_checksums(found, "x") == len(arrays)
    assert os.listdir(tmp_path) == [f"x{extension}"]


def test_paddle_reads_a_pdparams(files, tmp_path):
    arrays = reading.read(files / "vit_state_dict.pt")
    write(tmp_path / "x.pdparams", arrays)
    loaded = paddle.load(str(tmp_path / "x.pdparams"))
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert isinstance(loaded[name], paddle.Tensor)
        np.testing.assert_array_equal(loaded[name].numpy(), array, err_msg=name, strict=True)


def test_a_pdparams_loads_under_every_numpy(tmp_path):
    write(tmp_path / "x.pdparams", {"a": np.ones(3, np.float32)})
    content = (tmp_path / "x.pdparams").read_bytes()
    assert b"numpy.core.multiarray" in content
    assert b"numpy._core" not in content


def test_safetensors_reads_a_safetensors(files, tmp_path):
    arrays = reading.read(files / "vit_state_dict.pt")
    write(tmp_path / "x.safetensors", arrays)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name, strict=True)


def test_torch_reads_a_pt(files, tmp_path):
    arrays = dict(reading.read(files / "vit_state_dict.pt"))
    arrays["bfloat16"] = casting.cast(np.arange(4, dtype=np.float32), "bfloat16")
    write(tmp_path / "x.pt", arrays)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, **options)
        assert list(loaded) == list(arrays)
        assert loaded.pop("bfloat16").tolist() == [0, 1, 2, 3]
        for name, tensor in loaded.items():
            np.testing.assert_array_equal(tensor.numpy(), arrays[name], err_msg=name, strict=True)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    arrays = {"a": np.ones(3, np.float32), "b": np.zeros([2, 2], np.float16)}
    for extension in (".pdparams", ".safetensors", ".pt"):
        write(tmp_path / f"x{extension}", arrays)
        write(tmp_path / f"y{extension}", arrays)
        assert (tmp_path / f"x{extension}").read_bytes() == (tmp_path / f"y{extension}").read_bytes()


@FORMS
def test_a_changed_tensor_is_named(tmp_path, extension):
    write(tmp_path / f"x{extension}", {"a": np.full(1000, 7, np.float32), "b": np.full(1000, 8, np.float32)})
    content = (tmp_path / f"x{extension}").read_bytes()
    place = content.index(np.full(1000, 8, np.float32).tobytes()) + 400
    (tmp_path / "y").write_bytes(content[:place] + b"\1" + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"is damaged: (b changed|entry archive/data/1 fails its checksum)"):
        writing.verify_checksums(reading.read(tmp_path / "y"), "y")


@FORMS
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, extension, monkeypatch):
    path = tmp_path / f"x{extension}"
    path.write_bytes(b"old")

    class Failing:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(path, {"a": np.ones(3, np.float32), "b": Failing()})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
    with pytest.raises(OSError, match="broken disk"):
        write(path, {"a": np.ones(3, np.float32)})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


@FORMS
def test_a_file_that_reads_back_differently_is_not_named(tmp_path, extension, monkeypatch):
    read = writing.read

    def changed(path):
        checkpoint = read(path)
        checkpoint["a"] = checkpoint["a"] + 1
        return checkpoint

    monkeypatch.setattr(writing, "read", changed)
    with pytest.raises(CheckpointError, match="a read back differ"):
        write(tmp_path / f"x{extension}", {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_error(tmp_path):
    """The system refuses: the process may write no more than a megabyte to a file."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); import numpy as np; "
        "from paddle_clip.checkpoints import writing; "
        "writing.write(sys.argv[1], {'a': np.ones(1 << 20)}, lambda n: 'keep', lambda c: {})"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "x.pdparams")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "OSError: [Errno 27]" in done.stderr
    assert os.listdir(tmp_path) == []


def test_special_outputs_are_refused(tmp_path):
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("link.pt", "folder.pt", "fifo.pt"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            write(tmp_path / name, {"a": np.ones(1, np.float32)})
    assert (tmp_path / "real.pt").read_bytes() == b"old"
    (tmp_path / ".x.pt.partial").symlink_to(tmp_path / "real.pt")
    with pytest.raises(CheckpointError, match="is a link, or no file: delete it"):
        write(tmp_path / "x.pt", {"a": np.ones(1, np.float32)})
    assert (tmp_path / "real.pt").read_bytes() == b"old"


def test_two_processes_do_not_write_one_file(tmp_path):
    (tmp_path / ".x.pt.partial").write_bytes(b"")
    with open(tmp_path / ".x.pt.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing"):
            write(tmp_path / "x.pt", {"a": np.ones(1, np.float32)})
    write(tmp_path / "x.pt", {"a": np.ones(1, np.float32)})
    assert os.listdir(tmp_path) == ["x.pt"]


def test_what_a_killed_process_left_is_used_up(tmp_path):
    (tmp_path / ".x.pt.partial").write_bytes(b"left over" * 1000)
    write(tmp_path / "x.pt", {"a": np.ones(1, np.float32)})
    assert os.listdir(tmp_path) == ["x.pt"]
    assert reading.read(tmp_path / "x.pt")["a"].tolist() == [1]


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT"])
def test_killed_conversions_leave_no_partial_file(files, run, name):
    """The long run is `python tests/tools/kill.py`."""
    done = run("tests/tools/kill.py", files / "vit.pt", "--count", 15, "--signal", name)
    assert done.returncode == 0 and "killed 15 times" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_is_one_error_line(files, tmp_path, number):
    """The signal comes while the conversion writes; nothing is left, not even the file being written."""
    script = (
        "import os, signal, sys; sys.path.insert(0, 'convert'); import pt2paddle; "
        "from paddle_clip.checkpoints import writing; cast = writing.cast; "
        f"writing.cast = lambda *a: (os.kill(os.getpid(), {number:d}), cast(*a))[1]; "
        "sys.exit(pt2paddle.main())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(files / "vit.pt"), "-o", str(tmp_path / "x.pdparams")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_written_files_have_the_usual_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        write(tmp_path / "x.pt", {"a": np.ones(1, np.float32)})
    finally:
        os.umask(umask)
    assert os.stat(tmp_path / "x.pt").st_mode & 0o777 == 0o644


def test_cast_rounds_like_pytorch():
    random = np.random.default_rng(0)
    array = (random.standard_normal(100_000) * 10.0 ** random.integers(-30, 30, 100_000)).astype(np.float32)
    array[:4] = [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]  # the last two are ties
    expected = torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(casting.cast(array, "bfloat16"), expected, strict=True)
    widened = casting.cast(expected, "float32")
    np.testing.assert_array_equal(widened, torch.from_numpy(array).bfloat16().float().numpy(), strict=True)
    assert casting.cast(np.float32([np.nan]), "bfloat16")[0] & 0x7FC0 == 0x7FC0
    assert casting.cast(np.asarray(1.5, np.float32), "bfloat16").shape == ()
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(CheckpointError, match=f"w has numbers too large for {dtype}"):
            casting.cast(np.array([3.4e38 if dtype == "bfloat16" else 7e4], np.float32), dtype, "w")
        assert not np.isfinite(casting.cast(np.array([np.inf], np.float32), "float16"))


@pytest.mark.parametrize("transposed", [False, True])
def test_every_float16_widens_to_its_bits(tmp_path, transposed):
    """Zeros, subnormal numbers, infinities and NaNs are among them, in C order and transposed."""
    halves = np.resize(np.arange(65536, dtype=np.uint16), 3 * 65536).view(np.float16).reshape(1536, 128)
    halves = halves.T if transposed else halves
    writing.write(str(tmp_path / "x.safetensors"), {"x": halves}, lambda _name: "float32", lambda _checksums: {})
    widened = np.asarray(reading.read(str(tmp_path / "x.safetensors"))["x"])
    np.testing.assert_array_equal(widened.view(np.uint32), halves.astype(np.float32, order="C").view(np.uint32))


def test_float16_of_every_layout_widens_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(casting, "_PART", 512)
    monkeypatch.setattr(casting, "_BLOCK", 64)
    numbers = np.random.default_rng(0).standard_normal(6000).astype(np.float16)
    arrays = {
        "plain": numbers.reshape(60, 100),
        "transposed": numbers.reshape(60, 100).T,
        "tall, transposed": numbers.reshape(6, 1000).T,
        "wide, transposed": numbers.reshape(1000, 6).T,
        "strided": numbers[::3],
        "permuted": numbers.reshape(10, 20, 30).transpose(2, 0, 1),
        "one": numbers[0].reshape(()),
        "none": numbers[:0].reshape(0, 7),
        "none, transposed": numbers[:0].reshape(0, 7).T,
    }
    writing.write(str(tmp_path / "x.safetensors"), arrays, lambda _name: "float32", lambda _checksums: {})
    found = reading.read(str(tmp_path / "x.safetensors"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array.astype(np.float32), err_msg=name, strict=True)


def test_places_beyond_four_gigabytes_are_zip64(tmp_path, monkeypatch):
    """As in ViT-bigG's file; here they begin at 20,000 bytes."""
    arrays = {f"layer{number}": np.full([40, 50], number, np.float32) for number in range(6)}
    monkeypatch.setattr(writing, "_FAR", 20_000)
    write(tmp_path / "x.pt", arrays)
    assert b"PK\6\6" in (tmp_path / "x.pt").read_bytes()
    for found in (torch.load(tmp_path / "x.pt", weights_only=True), reading.read(tmp_path / "x.pt")):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(found[name]), array)
