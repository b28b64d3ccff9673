"""OpenAI's CLIP on PaddlePaddle."""

import ast
import importlib
import os
import sys
import warnings
import zlib  # noqa: F401  before Paddle, see extras.ZLIB_IS_BROKEN
from typing import Any

from .extras import NO_PADDLE, PADDLE_IS_INSTALLED, ZLIB_IS_BROKEN

__version__ = "0.1.0"

# What scripts written before there was `checkpoints` call its rooms.
_OLD_ROOMS = {"converter": "checkpoints.conversion", "weights": "checkpoints"}
# What takes Paddle itself. All else works without it: converting files, and what an export run by OpenVINO is for.
_WITH_PADDLE = ("CLIP", "ContrastiveLoss", "compile", "export", "finetune", "load")


def _read_stub() -> dict[str, str]:
    """{public name: the room it lives in}, of the stub beside this file, which editors and type checkers read."""
    with open(os.path.join(os.path.dirname(__file__), "__init__.pyi"), encoding="utf-8") as stub:
        lines = ast.parse(stub.read()).body
    return {
        alias.name: line.module
        for line in lines
        if isinstance(line, ast.ImportFrom) and line.level == 1 and line.module
        for alias in line.names
    }


# They are imported when they are first used: importing the package and converting files need no Paddle.
_ROOM_OF = _read_stub()

# `import *` leaves Python's own `compile` as it is.
__all__ = sorted(_ROOM_OF.keys() - {"compile"})

# What Paddle says to its developers, on standard error; it reads this when it is imported. And that there is no ccache,
# for those who compile C++.
os.environ.setdefault("GLOG_minloglevel", "2")
warnings.filterwarnings("ignore", "No ccache found", UserWarning)

if ZLIB_IS_BROKEN:
    warnings.warn(
        "paddle was imported before paddle_clip: Paddle 2 then crashes Pillow on PNG images. Import paddle_clip first",
        RuntimeWarning,
        stacklevel=2,
    )
# Those of the commands that need Paddle say so themselves.
if not PADDLE_IS_INSTALLED and os.path.basename("".join(sys.argv[:1])) not in ("paddle-clip", "-m"):
    warnings.warn(NO_PADDLE, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name in _OLD_ROOMS:
        return importlib.import_module(f"{__name__}.{_OLD_ROOMS[name]}")
    if name in _ROOM_OF.values():  # such as paddle_clip.transforms
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not PADDLE_IS_INSTALLED and (name in _WITH_PADDLE or name.startswith("clip_")):
        raise ImportError(NO_PADDLE)
    return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM_OF])
