"""Unkind machines: full disks, folders that nobody may write to, two processes at once, and `kill -9`.

Each command that writes ends with one line that says why, leaves nothing behind, and what was there before as it was.
"""

import contextlib
import fcntl
import os
import re
import resource

import numpy as np
import pytest

import kill
import paddle_clip
from commands import COMMANDS, TINY, prepare
from paddle_clip import cli
from unkind import put_before

each_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """A function running a command of COMMANDS in a folder of its own; returns the one line of its error."""
    prepare(tmp_path, count=12)
    monkeypatch.chdir(tmp_path)

    def call(name):
        arguments = COMMANDS[name].arguments.replace("--batch-size 16", "--batch-size 6")
        code = cli.main(arguments.split())
        err = capsys.readouterr().err
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call


@contextlib.contextmanager
def small_disk(size):
    """Lets this process write no file of more bytes than these."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Bytes that a file may have; for `embed`, where the journal, the rows, and what is made of them do not fit. In `export`
# Paddle tells of it in words of its own: test_deploy.py.
@pytest.mark.filterwarnings("error")  # of what is left open, too
@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in COMMANDS if name != "export" for size in (0, 700)]
    + [("convert", 1 << 20), ("embed", 2000), ("embed-parquet", 2000)],
)
def test_a_full_disk(error_of, tmp_path, name, size):
    was = put_before(COMMANDS[name], tmp_path / "out")
    with small_disk(size):
        assert re.fullmatch(r"error: \S*out/\.?x.*: File too large\n", error_of(name))
    assert kill.results(tmp_path / "out") == was
    assert sorted(os.listdir(tmp_path / "out")) == sorted(was)


def test_a_full_disk_loses_no_rows(error_of, tmp_path):
    """All rows have room, and the table made of them has none."""
    out, arguments = tmp_path / "out", COMMANDS["embed-parquet"].arguments.split()
    assert cli.main(arguments) == 0
    expected = kill.results(out)
    (out / "x.parquet").unlink()
    with small_disk(3500):
        assert "out/x.parquet: File too large" in error_of("embed-parquet")
    assert sorted(os.listdir(out)) == [".x.parquet.journal", ".x.parquet.partial"]
    assert cli.main(arguments) == 0
    assert kill.results(out) == expected and os.listdir(out) == ["x.parquet"]


@each_command
def test_a_folder_that_nobody_may_write_to(error_of, tmp_path, name):
    """Where the file system cannot be written to; root, who may run this, is stopped by no mode of a folder."""
    (tmp_path / "out").rmdir()
    (tmp_path / "out").symlink_to("/sys", target_is_directory=True)
    error = error_of(name)
    assert "/sys" in error or "out" in error


@each_command
def test_two_at_once(error_of, tmp_path, name):
    out = tmp_path / "out"
    was = put_before(COMMANDS[name], out)
    ending = {"embed": "journal", "embed-parquet": "journal", "finetune": "lock"}.get(name, "partial")
    hidden = out / f".{COMMANDS[name].outputs[-1]}.{ending}"
    if name == "export":
        hidden.mkdir()
    descriptor = os.open(hidden, os.O_RDONLY | (0 if name == "export" else os.O_CREAT))
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process is writing" in error_of(name)
    os.close(descriptor)
    assert kill.results(out) == was


@pytest.mark.parametrize("name", ["embed", "finetune", "export"])
def test_a_killed_command(run, name):
    """The long run is `python tests/tools/kill.py --command embed`, for each command; conversions: test_writers.py."""
    done = run("tests/tools/kill.py", "--command", name, "--count", 1, "--images", 32)
    assert done.returncode == 0 and "killed 1 times" in done.stdout, done.stderr


def test_a_model_needs_its_file_no_longer(tmp_path):
    """Mapped files that become shorter end the process; see SECURITY.md."""
    path = tmp_path / "x.pdparams"
    paddle_clip.convert(TINY, path)
    model, _ = paddle_clip.load(path)
    before = model.encode_text(model.tokenize("a red circle")).numpy()
    os.truncate(path, 0)
    np.testing.assert_array_equal(model.encode_text(model.tokenize("a red circle")).numpy(), before)
