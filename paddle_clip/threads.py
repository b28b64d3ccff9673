"""Cores, kernels and memory that suit Paddle on a CPU: what it leaves to variables of the environment.

Paddle computes on one core unless OMP_NUM_THREADS says more, and its MKL takes slow kernels on AMD processors unless
MKL_DEBUG_CPU_TYPE is 5. Both can still be changed after Paddle's import, as long as no product was computed.
"""

import contextlib
import ctypes
import os
from functools import lru_cache
from typing import Optional

from .extras import OMP_NUM_THREADS

_CGROUPS = "/sys/fs/cgroup"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's `mallopt`, from its malloc.h
_KEPT_BYTES = 1 << 30
_is_done = False


def available_cores() -> int:
    """The number of cores this process may use: by its affinity and by the quota of its control groups, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def use_cores(threads: Optional[int] = None) -> None:
    """Has Paddle compute on all cores this process may use, with MKL's fast kernels on an AMD processor.

    Every `CLIP` does so when it is made, once in a process; importing the package changes nothing. What the user chose
    stands: OMP_NUM_THREADS in the environment, MKL_DEBUG_CPU_TYPE, a GPU as Paddle's device. A process that
    `paddle.distributed.launch` started takes its share of the cores, and a worker of a `DataLoader` the one it has.

    Args:
        threads: number of threads; by default one for each core. Given, it is set whenever this is called.
    """
    import paddle

    global _is_done
    if threads is None and (_is_done or paddle.get_device() != "cpu"):
        return
    _is_done = True  # what the user sets from here on stands
    _choose_kernels()
    if threads is None:
        if _chosen_by_user() or paddle.io.get_worker_info() is not None:
            return
        threads = max(1, available_cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))
    paddle.base.core.set_num_threads(threads)


def _chosen_by_user() -> bool:
    """Whether OMP_NUM_THREADS was set by somebody else than Paddle."""
    if OMP_NUM_THREADS or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        with open("/proc/self/environ", "rb") as file:  # the environment the process was started with
            return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in file.read().split(b"\0"))
    except OSError:  # a system without it
        return False


def _choose_kernels() -> None:
    """Has MKL take its AVX2 kernels on AMD processors, which it keeps for Intel's otherwise."""
    if "MKL_DEBUG_CPU_TYPE" not in os.environ and _is_amd():
        os.environ["MKL_DEBUG_CPU_TYPE"] = "5"


@lru_cache(1)
def keep_memory() -> None:
    """Has glibc keep up to a gigabyte of freed memory for the next Tensors, once in a process.

    It would give feature maps and hidden layers back to the system, and the system clear the next ones page by page:
    60,000 pages for eight images of an RN50, a seventh of their time. What the user chose by
    MALLOC_TRIM_THRESHOLD_ and the like stands, and other C libraries are left as they are.
    """
    if not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no `mallopt`, or none that is found this way
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@lru_cache(1)
def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            start = file.read(1 << 14)
    except OSError:
        return False
    return "AuthenticAMD" in start and " avx2" in start


def _cgroup_quota() -> Optional[float]:
    """The cores that the control groups of this process leave it, or None if they set no limit."""
    quotas = []
    for folder in _own_groups():
        # Version 2 has both numbers in one file, version 1 each in its own.
        words = _read_words(folder, "cpu.max") or [
            *_read_words(folder, "cpu.cfs_quota_us"),
            *_read_words(folder, "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _own_groups() -> list[str]:
    """The folders of this process's control groups and of those above them; some may not exist."""
    folders = [_CGROUPS, os.path.join(_CGROUPS, "cpu")]
    try:
        with open("/proc/self/cgroup") as file:
            for line in file:
                _number, controllers, path = line.strip().split(":", 2)
                if controllers == "" or "cpu" in controllers.split(","):
                    root, parts = folders[bool(controllers)], path.strip("/").split("/")
                    folders += [os.path.join(root, *parts[:depth]) for depth in range(1, len(parts) + 1)]
    except (OSError, ValueError):  # a system without them
        pass
    return folders


def _read_words(folder: str, name: str) -> list[str]:
    try:
        with open(os.path.join(folder, name)) as file:
            return file.read().split()
    except OSError:
        return []
