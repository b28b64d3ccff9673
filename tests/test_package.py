"""What is installed, what importing costs, and what it says where Paddle is missing."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile

from conftest import ROOT

import paddle_clip


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
    folder = os.path.join(ROOT, "paddle_clip")
    sources = {f"paddle_clip/{name}" for name in os.listdir(folder) if name.endswith(".py")}
    files = (os.path.join(place, name) for place, _, names in os.walk(os.path.join(folder, "data")) for name in names)
    data = {os.path.relpath(file, ROOT) for file in files}
    assert packaged == sources | data
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


def test_without_paddle_the_two_commands_are_named(run):
    block = "import sys; sys.modules['paddle'] = None; "
    done = run("-c", block + "import paddle_clip")
    assert done.returncode == 0
    assert "pip install paddlepaddle." in done.stderr
    assert "pip install paddlepaddle-gpu" in done.stderr
    for use in ("paddle_clip.load", "paddle_clip.clip_rn50()", "paddle_clip.tokenize"):
        done = run("-W", "ignore", "-c", block + f"import paddle_clip; {use}")
        assert done.stderr.splitlines()[-1].startswith("ImportError: paddle_clip needs PaddlePaddle"), use


def test_the_grammar_is_python_39s():
    """Every file parses on the oldest Python supported."""
    for folder in ("paddle_clip", "convert", "examples", "tests"):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith(".py"):
                with open(os.path.join(ROOT, folder, name), encoding="utf-8") as file:
                    ast.parse(file.read(), name, feature_version=(3, 9))
