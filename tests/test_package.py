"""The installed files, the cost of importing, and the messages where Paddle is missing."""

import ast
import builtins
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import ROOT

import paddle_clip
from paddle_clip import extras


def test_the_wheel_holds_paddle_clip_alone(tmp_path):
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignore)
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    subprocess.run(command, cwd=tmp_path / "clone", check=True, capture_output=True)
    (wheel,) = (tmp_path / "clone").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"paddle_clip"}
    packaged = {name for name in names if name.startswith("paddle_clip/")}
    walk = os.walk(os.path.join(ROOT, "paddle_clip"))
    files = {os.path.relpath(os.path.join(place, name), ROOT) for place, _, names in walk for name in names}
    assert packaged == {name for name in files if "__pycache__" not in name}
    needed = ("bpe_simple_vocab_16e6.txt.gz", "README.md", "clip_tiny.pt", "clip_tiny.json", "samples/red-circle.png")
    assert {f"paddle_clip/data/{name}" for name in needed} <= packaged


def test_importing_is_light(run):
    done = run("-c", "import sys, paddle_clip; print(sorted({'paddle', 'torch', 'PIL', 'numpy'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_torch_is_never_imported(run, files):
    script = (
        "import sys; sys.modules['torch'] = None; import paddle_clip; "
        f"model, preprocess = paddle_clip.load({str(files / 'vit.pt')!r}); "
        "[getattr(paddle_clip, name) for name in paddle_clip.__all__]; print('done')"
    )
    assert run("-c", script).stdout.strip().endswith("done")


def test_every_public_name_is_there():
    assert set(paddle_clip.__all__) <= set(dir(paddle_clip))
    for name in paddle_clip.__all__:
        assert getattr(paddle_clip, name).__doc__, name


def test_a_star_import_shadows_nothing():
    names = {}
    exec("from paddle_clip import *", names)
    assert names["load"] is paddle_clip.load
    assert not names.keys() & set(dir(builtins))


def test_without_paddle_the_two_commands_are_named(run):
    block = "import sys; sys.modules['paddle'] = None; "
    done = run("-c", block + "import paddle_clip")
    assert done.returncode == 0
    assert "pip install paddlepaddle." in done.stderr
    assert "pip install paddlepaddle-gpu" in done.stderr
    for use in ("paddle_clip.load", "paddle_clip.clip_rn50()", "paddle_clip.compile"):
        done = run("-W", "ignore", "-c", block + f"import paddle_clip; {use}")
        assert done.stderr.splitlines()[-1].startswith("ImportError: paddle_clip needs PaddlePaddle"), use


def test_the_grammar_is_python_39s():
    """Every file parses on the oldest Python supported."""
    for folder in ("paddle_clip", "convert", "examples", "tests"):
        for path in Path(ROOT, folder).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 9))


def test_the_extras_are_those_of_pyproject():
    """A message tells to install the packages that the extra installs."""
    text = Path(ROOT, "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    listed = dict(re.findall(r"^([\w-]+) = (\[.*\])", section, re.MULTILINE))
    for extra, packages in extras.EXTRAS.items():
        found = {re.split("[<>=]", requirement)[0] for requirement in ast.literal_eval(listed[extra])}
        assert found == {extras._PIP_NAMES.get(package, package) for package in packages}, extra


def test_rooms_are_attributes():
    code = "import paddle_clip; print(paddle_clip.transforms.image_transform, paddle_clip.presets.PRESETS[0].name)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("RN50\n")
