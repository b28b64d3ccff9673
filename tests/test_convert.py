"""The converter's command line, as a user types it."""

import hashlib
import os

import numpy as np
import paddle
import pytest
import torch

import paddle_clip
from paddle_clip.checkpoints import dialects, writing
from paddle_clip.checkpoints.shapes import parameter_shapes

PT2PADDLE = os.path.join("convert", "pt2paddle.py")


@pytest.fixture
def folder(files, tmp_path):
    """A folder with copies of the two archives."""
    for name in ("resnet.pt", "vit.pt"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    return tmp_path


def fails(done, *words):
    """Asserts that a command failed with one `error:` line that has these words, and printed nothing else."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    return True


def test_converts_several_files_beside_them(run, folder, arrays_of):
    done = run(PT2PADDLE, folder / "resnet.pt", folder / "vit.pt")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar in a pipe
    assert sorted(os.listdir(folder)) == ["resnet.pdparams", "resnet.pt", "vit.pdparams", "vit.pt"]
    for variant in ("resnet", "vit"):
        assert f"{variant}.pt -> {folder / variant}.pdparams" in done.stdout
        assert hashlib.sha256((folder / f"{variant}.pt").read_bytes()).hexdigest() in done.stdout
        expected = dialects.from_checkpoint(arrays_of(variant)).arrays
        loaded = paddle.load(str(folder / f"{variant}.pdparams"))
        assert loaded.keys() == expected.keys()
        for name, tensor in loaded.items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name].astype(np.float32), strict=True)
    assert "preset     none: embed_dim " in done.stdout
    assert "not an official file" in done.stdout


def test_names_the_preset(run, files, tmp_path):
    """A full-size file is recognised by its shapes."""
    row = paddle_clip.presets.preset("ViT-B/32")
    shapes = parameter_shapes(row.config)
    zeros = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    writing.write(tmp_path / "in.pdparams", zeros, lambda name: "keep", lambda checksums: {})
    done = run(PT2PADDLE, tmp_path / "in.pdparams", "-o", tmp_path / "out.pdparams", "--dtype", "keep")
    assert done.returncode == 0, done.stderr
    assert "  preset     ViT-B/32\n" in done.stdout


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "keep"])
def test_dtypes(run, folder, arrays_of, dtype):
    output = folder / "out.pdparams"
    assert run(PT2PADDLE, folder / "vit.pt", "-o", output, "--dtype", dtype).returncode == 0
    loaded = paddle.load(str(output))
    for name, array in dialects.from_checkpoint(arrays_of("vit")).arrays.items():
        expected = array.dtype.name if dtype == "keep" else dtype
        assert loaded[name].dtype == getattr(paddle, expected), name
        rounded = torch.from_numpy(array.copy()).to(getattr(torch, expected)).float().numpy()
        np.testing.assert_array_equal(loaded[name].astype("float32").numpy(), rounded, err_msg=name)


def test_imports_neither_framework(run, folder):
    """The script runs where neither can be imported."""
    blocked = "import sys, runpy; sys.modules.update(torch=None, paddle=None); sys.argv = sys.argv[1:]; "
    done = run("-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')", PT2PADDLE, folder / "vit.pt")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (folder / "vit.pdparams").exists()


def test_works_from_any_folder(run, folder):
    done = run(os.path.abspath(PT2PADDLE), "vit.pt", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "vit.pt -> vit.pdparams" in done.stdout


def test_errors_are_one_line_and_touch_nothing(run, files, folder):
    (folder / "old.pdparams").write_bytes(b"old")
    (folder / "text.pt").write_text("not a checkpoint\nat all\n")
    (folder / "short.pt").write_bytes((folder / "vit.pt").read_bytes()[:-1000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "evil.pt").write_bytes((files / "evil.pt").read_bytes())
    (folder / "other.pt").write_bytes((files / "tensors.pt").read_bytes())
    before = sorted(os.listdir(folder))
    out = ("-o", folder / "old.pdparams")
    assert fails(run(PT2PADDLE, folder / "none.pt", *out), "none.pt", "No such file")
    assert fails(run(PT2PADDLE, folder, *out), "holds no weights", "give its path")
    assert fails(run(PT2PADDLE, folder / "text.pt", *out), "not a checkpoint", "expected a PyTorch .pt")
    assert fails(run(PT2PADDLE, folder / "short.pt", *out), "damaged or truncated", "download it again")
    assert fails(run(PT2PADDLE, folder / "empty.pt", *out), "is empty")
    assert fails(run(os.path.abspath(PT2PADDLE), folder / "evil.pt", *out, cwd=folder), "refused", ".system")
    assert fails(run(PT2PADDLE, folder / "other.pt", *out), "is not a CLIP model", "ln_final.weight is missing")
    assert fails(run(PT2PADDLE, folder / "vit.pt", "-o", folder / "nowhere" / "x.pdparams"), "does not exist")
    assert fails(run(PT2PADDLE, folder / "vit.pt", "-o", folder / "vit.pt"), "is the input itself")
    os.mkfifo(folder / "fifo")
    assert fails(run(PT2PADDLE, "/dev/zero", *out), "not a regular file")
    assert fails(run(PT2PADDLE, folder / "fifo", *out), "not a regular file")
    os.unlink(folder / "fifo")
    assert sorted(os.listdir(folder)) == before
    assert (folder / "old.pdparams").read_bytes() == b"old"


def test_one_bad_file_among_good_ones(run, folder):
    (folder / "text.pt").write_text("not a checkpoint")
    done = run(PT2PADDLE, folder / "vit.pt", folder / "text.pt", folder / "resnet.pt")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert (folder / "vit.pdparams").exists()
    assert (folder / "resnet.pdparams").exists()
    assert not (folder / "text.pdparams").exists()


def test_one_output_for_two_files_is_refused(run, folder):
    done = run(PT2PADDLE, folder / "vit.pt", folder / "resnet.pt", "-o", folder / "x.pdparams")
    assert done.returncode == 2
    assert "several files" in done.stderr


def test_an_output_of_another_extension_is_refused(run, folder):
    fails(run(PT2PADDLE, folder / "vit.pt", "-o", folder / "vit.pth"), "ends with .pdparams, .safetensors or .pt")
    assert sorted(os.listdir(folder)) == ["resnet.pt", "vit.pt"]


def test_files_that_differ_in_the_extension_alone_are_checked_together(run, folder):
    (folder / "vit.pth").write_bytes((folder / "vit.pt").read_bytes())
    files = [folder / "vit.pt", folder / "vit.pth"]
    assert run(PT2PADDLE, *files, "--check").returncode == 0
    done = run(PT2PADDLE, *files)
    assert done.returncode == 2
    assert "only their extensions differ" in done.stderr
