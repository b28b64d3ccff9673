"""The commands that write files, on small inputs: kill.py kills them, test_unkind.py has the disk full.

All work in one folder: they read `images/`, and write below `out/`.
"""

import multiprocessing
import os
import pathlib
import sys
import warnings
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import numpy as np
import pyarrow.parquet  # noqa: F401
import sklearn.linear_model  # noqa: F401
from PIL import Image

import paddle_clip.deploy
import paddle_clip.probe
import paddle_clip.training  # noqa: F401
from paddle_clip import features
from paddle_clip.cli.main import console

# isort: split
import paddle

# Paddle's own handlers print what happened, with locks that a process may hold when it is terminated: some hung.
paddle.disable_signal_handler()

# Forked from a process that has imported what takes a second. Not from the caller: Paddle 2 writes the lines of all
# calls into a program, and no two of them would be equal.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["commands"])
# Before Python 3.12 that process finds modules by this variable alone.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [os.path.dirname(os.path.abspath(__file__)), os.environ.get("PYTHONPATH", "")]
)
TINY = os.path.join(ROOT, "paddle_clip", "data", "clip_tiny.pt")
IMAGES = 96
OFTEN = 0.02  # seconds between two checkpoints of `embed`: for nearly each batch, in place of one for each second


class Command(NamedTuple):
    """A command, and what it makes in `out/`.

    Attributes:
        arguments: those of `paddle-clip`.
        outputs: names of what it makes.
        late: the output that may be missing for a moment, while what was there before is replaced.
        kept: the name of what a killed run leaves for the next one on purpose, and which is not hidden.
    """

    arguments: str
    outputs: tuple[str, ...]
    late: str = ""
    kept: str = ""


COMMANDS = {
    "convert": Command(f"convert {TINY} -o out/x.pdparams", ("x.pdparams",)),
    "embed": Command("embed images -o out/x.npy --model tiny --batch-size 8", ("x.json", "x.npy"), late="x.json"),
    "embed-parquet": Command("embed images -o out/x.parquet --model tiny --batch-size 8", ("x.parquet",)),
    "finetune": Command(
        "finetune images -o out/x.pdparams --model tiny --resume --epochs 2 --batch-size 16 --save-every 3",
        ("x.pdparams",),
        kept="x.checkpoint.safetensors",
    ),
    "export": Command("export out/x --model tiny", ("x",), late="x"),
    "probe": Command("probe images -o out/x.npz --model tiny --C 1", ("x.npz",)),
}


def prepare(folder: pathlib.Path, count: int = IMAGES) -> None:
    """Makes the pictures that commands read, of two classes, and the folder they write to."""
    numbers = np.random.default_rng(0)
    (folder / "out").mkdir()
    for index in range(count):
        place = folder / "images" / ("light" if index % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 128, [32, 32, 3]) + 127 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index:04}.png")


def start(command: Command, folder: pathlib.Path) -> BaseProcess:
    """Starts a command in a process of its own, which has imported everything already.

    What the command prints as errors is in `folder/errors-PID`.
    """
    running = FORK.Process(target=_run, args=(command, folder))
    running.start()
    return running


def _run(command: Command, folder: pathlib.Path) -> None:
    warnings.simplefilter("ignore")
    os.chdir(folder)
    for descriptor, name in ((1, os.devnull), (2, f"errors-{os.getpid()}")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.argv = ["paddle-clip", *command.arguments.split()]
    features._CHECKPOINT_SECONDS = OFTEN
    console()


def outcome(running: BaseProcess, folder: pathlib.Path) -> tuple[Optional[int], str]:
    """Waits for a command; returns its exit code, and what it printed as errors."""
    running.join()
    return running.exitcode, (folder / f"errors-{running.pid}").read_text()
