"""Files: the atomic replace, its lock, and systems without `pwrite` and `fcntl`."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from paddle_clip import CheckpointError
from paddle_clip.checkpoints import files as checkpoint_files
from paddle_clip.checkpoints.files import replacing

# A system without `pwrite` and `fcntl`, as Windows is.
WITHOUT = "import os, sys; del os.pwrite; sys.modules['fcntl'] = None; "


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with replacing(path) as (file, temporary):
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert os.path.dirname(temporary) == str(tmp_path)
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), replacing(path) as (file, _):
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_two_writers_do_not_mix(tmp_path):
    with (
        replacing(tmp_path / "x.npz") as (file, _),
        pytest.raises(CheckpointError, match="another process is writing"),
        replacing(tmp_path / "x.npz"),
    ):
        raise AssertionError(f"two writers hold {file.name}")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_links_are_not_written_through(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / ".x.npz.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="is a link, or no file"), replacing(tmp_path / "x.npz"):
        pass
    assert (tmp_path / "precious").read_bytes() == b"kept"


@pytest.mark.parametrize("extension", [".pdparams", ".safetensors", ".pt"])
def test_conversion_without_pwrite_and_fcntl(files, tmp_path, extension):
    """The same bytes are written where a file has one position for all threads and no lock."""
    results = []
    for name, prelude in (("linux", ""), ("other", WITHOUT)):
        output = tmp_path / f"{name}{extension}"
        script = f"{prelude}import sys; from paddle_clip import convert; convert(sys.argv[1], sys.argv[2])"
        command = [sys.executable, "-W", "ignore", "-c", script, str(files / "vit.pt"), str(output)]
        subprocess.run(command, cwd=ROOT, check=True)
        results.append(output.read_bytes())
    assert results[0] == results[1]
    assert sorted(os.listdir(tmp_path)) == [f"linux{extension}", f"other{extension}"]


def test_probes_and_features_without_pwrite_and_fcntl(tmp_path):
    script = (
        WITHOUT + "import numpy as np, paddle_clip; from paddle_clip import LinearProbe; "
        "LinearProbe(np.ones([2, 2]), np.ones(2), np.arange(2), 1.0).save(sys.argv[1] + '/x.npz'); "
        "model, preprocess = paddle_clip.load('tiny'); "
        "paddle_clip.embed(model, preprocess, paddle_clip.samples(), sys.argv[1] + '/x.npy')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], cwd=ROOT, check=True)
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.npy", "x.npz"]
    assert np.load(tmp_path / "x.npy").shape == (8, 64)


def test_what_is_written_is_what_was_given(tmp_path, monkeypatch):
    """Short writes, which a system may make, lose nothing."""
    monkeypatch.setattr(checkpoint_files, "_WRITTEN_AT_ONCE", 7)
    content = bytes(range(256)) * 3
    with replacing(tmp_path / "x") as (file, _):
        checkpoint_files.write_at(file, content[100:], 100)
        checkpoint_files.write_at(file, content[:100], 0)
    assert (tmp_path / "x").read_bytes() == content
