"""Cores and kernels: the choice of the package, and the choice of the user, which stands."""

import os
import subprocess
import sys

import paddle
import pytest
from conftest import ROOT

import paddle_clip
from paddle_clip import threads

# Prints the numbers of cores given to Paddle, and the kernels chosen for MKL before and after a model is made.
SCRIPT = """
import sys, types
{before}
import paddle_clip, paddle
cores = []
paddle.base.core.set_num_threads = cores.append
from paddle_clip import threads
threads._is_amd = lambda: True
threads.available_cores = lambda: 6
imported = os.environ.get("MKL_DEBUG_CPU_TYPE")
{after}
for _ in range(2):
    paddle_clip.CLIP(8, 32, 1, 64, 16, 4, 20, 64, 1, 1)
print(cores, imported, os.environ.get("MKL_DEBUG_CPU_TYPE"))
"""


def ran(before="", after="", **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    script = "import os\n" + SCRIPT.format(before=before, after=after)
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_model_takes_all_cores_once_and_importing_changes_nothing():
    assert ran() == "[6] None 5"
    assert ran(before="import paddle") == "[6] None 5"  # importing Paddle sets OMP_NUM_THREADS to 1


@pytest.mark.parametrize("number", ["1", "3"])
def test_what_the_environment_says_stands(number):
    assert ran(OMP_NUM_THREADS=number) == "[] None 5"
    assert ran(before=f"os.environ['OMP_NUM_THREADS'] = '{number}'") == "[] None 5"


def test_kernels_that_were_chosen_stand():
    assert ran(MKL_DEBUG_CPU_TYPE="4") == "[6] 4 4"


def test_who_is_launched_takes_a_share():
    assert ran(PADDLE_LOCAL_SIZE="2") == "[3] None 5"
    assert ran(PADDLE_LOCAL_SIZE="50") == "[1] None 5"


def test_a_data_loaders_worker_takes_no_more():
    worker = "paddle.io.get_worker_info = lambda: types.SimpleNamespace(id=0)"
    assert ran(after=worker) == "[] None 5"


def test_a_number_that_was_asked_for():
    assert ran(after="threads.use_cores(4)", OMP_NUM_THREADS="1") == "[4] None 5"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_quotas_of_control_groups_count(tmp_path, monkeypatch, files, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(threads, "_CGROUPS", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(4)))
    assert threads.available_cores() == cores


KEPT = """
import ctypes
from paddle_clip import threads
calls = []
library = type("Library", (), {{"mallopt": lambda self, *call: calls.append(call)}})()
ctypes.CDLL = lambda name: {library}
threads.keep_memory(), threads.keep_memory()
print(calls)
"""


def kept(library="library", **environment):
    script = KEPT.format(library=library)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr


def test_memory_is_kept_once_unless_the_environment_says_otherwise():
    assert kept() == "[(-3, 1073741824), (-1, 1073741824)]"
    assert kept(MALLOC_TRIM_THRESHOLD_="131072") == "[]"
    assert kept(GLIBC_TUNABLES="glibc.malloc.hugetlb=1") == "[]"


def test_another_c_library_is_left_as_it_is():
    assert kept(library="object()") == "[]"


@pytest.mark.parametrize(("layers", "patch"), [((1, 1, 1, 1), None), (1, 16)])
@pytest.mark.parametrize("tower", ["visual", "text"])
def test_memory_is_kept_from_the_first_encoding_on(layers, patch, tower):
    model = paddle_clip.CLIP(8, 32, layers, 64, patch, 4, 20, 64, 1, 1)
    threads.keep_memory.cache_clear()
    if tower == "visual":
        model.visual(paddle.zeros([1, 3, 32, 32]))
    else:
        model.encode_text(paddle.zeros([1, 4], "int64"))
    assert threads.keep_memory.cache_info().currsize == 1
