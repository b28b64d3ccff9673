"""Installs the clone into a fresh environment and uses it: `python tests/smoke.py [--python PATH]`.

A copy of the clone is installed with pip, from where pip finds packages, and beside it nothing but pytest: no PyTorch,
no linters. Then the commands run, outside the clone, and those tests that need no PyTorch. Prints a line for each step.
At the first that fails it prints that step's output and exits 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What of the clone is needed; checkpoints that lie in it are not, and may be large.
FOLDERS = ("convert", "examples", "paddle_clip", "tests")
FILES = ("CONTRIBUTING.md", "LICENSE", "README.md", "presets.py", "pyproject.toml", "setup.py")

LABELS = ("red circle", "orange star", "green heart", "blue triangle", "black cross", "yellow diamond")
TOKENS = [49406, 320, 1929, 49407, 0]  # "a dog" between start and end
# What was installed; and that PyTorch was not.
VERSIONS = """
import importlib.metadata, importlib.util, platform
assert importlib.util.find_spec("torch") is None, "torch was installed"
installed = [f"{name} {importlib.metadata.version(name)}" for name in ("paddlepaddle", "numpy")]
print(f"Python {platform.python_version()}", *installed, sep=", ")
"""
# None of these imports PyTorch, or reads a file that it wrote.
TESTS = (
    "test_house.py",
    "test_pairs.py",
    "test_presets.py",
    "test_package.py::test_importing_is_light",
    "test_package.py::test_every_public_name_is_there",
    "test_package.py::test_without_paddle_the_two_commands_are_named",
    "test_package.py::test_the_grammar_is_python_39s",
    "test_package.py::test_the_extras_are_those_of_pyproject",
    "test_tokenizer.py::test_tokenize_pads_and_frames",
    "test_tokenizer.py::test_long_texts_are_refused_or_cut",
    "test_tokenizer.py::test_decode_undoes_tokenize",
    "test_tiny.py::test_it_loads_without_a_network_or_a_cache",
    "test_tiny.py::test_the_factory_builds_its_sizes",
    "test_tiny.py::test_it_knows_the_samples",
)


class StepError(Exception):
    """A step failed; the message is what it printed."""


class Smoke:
    """A fresh environment in a folder, and the steps that are done in it.

    Args:
        folder: an empty folder.
        python: the Python the environment is made of.
    """

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        self.clone, self.work = os.path.join(folder, "clone"), os.path.join(folder, "work")
        self.bin = os.path.join(folder, "env", "bin")
        self.environment = {**os.environ, "GLOG_minloglevel": "2"}
        self.environment.pop("PYTHONPATH", None)  # which would bring packages from outside

    def run(self, program, *arguments, cwd=None):
        """Runs a program, of the environment if it is named without a folder; returns what it prints."""
        command = [os.path.join(self.bin, program), *arguments]  # join leaves an absolute path as it is
        done = subprocess.run(
            command,
            cwd=cwd or self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise StepError(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def steps(self):
        """What is done, in order: (what it is called, a function that does it and may return words to print)."""
        script = os.path.join(self.clone, "convert", "pt2paddle.py")
        yield "copy of the clone", self.copy
        yield "virtual environment", lambda: self.run(self.python, "-m", "venv", os.path.dirname(self.bin))
        yield "pip install .[cpu]", lambda: self.install(".[cpu]")
        yield "versions", lambda: self.run("python", "-c", VERSIONS)
        yield "paddle-clip --version", lambda: self.run("paddle-clip", "--version")
        yield "paddle-clip --help", self.help
        yield "paddle-clip convert", lambda: self.convert("one", "paddle-clip", "convert")
        yield "convert/pt2paddle.py", lambda: self.convert("two", "python", script)
        yield "both results are the same", self.compare
        yield "paddle-clip classify", self.classify
        yield "paddle_clip.tokenize", self.tokenize
        yield "pip install pytest", lambda: self.install("pytest>=7", "pytest-timeout")
        yield "tests without PyTorch", self.test

    def copy(self):
        os.mkdir(self.work)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in FOLDERS:
            shutil.copytree(os.path.join(ROOT, name), os.path.join(self.clone, name), ignore=ignore)
        for name in FILES:
            shutil.copy(os.path.join(ROOT, name), self.clone)

    def install(self, *requirements):
        self.run("pip", "install", "--quiet", "--disable-pip-version-check", *requirements, cwd=self.clone)

    def help(self):
        shown = self.run("paddle-clip", "--help")
        for command in ("convert", "classify", "embed"):
            require(command in shown, f"the help does not name {command}:\n{shown}")

    def convert(self, name, *command):
        """Converts the model in the package to a file of this name."""
        output = f"{name}.pdparams"
        self.run(*command, os.path.join(self.clone, "paddle_clip", "data", "clip_tiny.pt"), "-o", output)
        size = os.path.getsize(os.path.join(self.work, output))
        return f"{size:,} bytes"

    def compare(self):
        contents = []
        for name in ("one", "two"):
            with open(os.path.join(self.work, f"{name}.pdparams"), "rb") as file:
                contents.append(file.read())
        require(contents[0] == contents[1], "paddle-clip convert and convert/pt2paddle.py wrote different files")

    def classify(self):
        options = ["--model", "tiny", "--labels", *LABELS, "--top-k", "1", "--json"]
        shown = self.run("paddle-clip", "classify", "@samples", *options)
        found = {os.path.basename(image["image"]): image["labels"][0]["label"] for image in json.loads(shown)}
        require(found.get("red-circle.png") == "red circle", f"red-circle.png is no red circle:\n{shown}")
        return f"red-circle.png is a {found['red-circle.png']}"

    def tokenize(self):
        script = "import paddle_clip; print(paddle_clip.tokenize('a dog')[0].tolist()[:5])"
        shown = self.run("python", "-c", script)
        require(json.loads(shown) == TOKENS, f"'a dog' should be {TOKENS}, and is {shown}")

    def test(self):
        """Runs the tests in the copy; returns pytest's last line."""
        tests = [os.path.join("tests", name) for name in TESTS]
        return self.run("python", "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=self.clone).splitlines()[-1]


def require(condition, message):
    if not condition:
        raise StepError(message)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="another Python (default: this one)")
    arguments = parser.parse_args()
    python = shutil.which(arguments.python)
    if not python:
        parser.error(f"{arguments.python} is no program")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="paddle-clip-smoke-") as folder:
        for name, do in Smoke(folder, os.path.abspath(python)).steps():
            begin = time.perf_counter()
            try:
                words = do()
            except StepError as error:
                print(f"failed: {name}\n{error}", flush=True)
                return 1
            seconds = time.perf_counter() - begin
            print(f"{seconds:>6.1f} s  {name}" + (f": {words.strip('= ' + os.linesep)}" if words else ""), flush=True)
    print(f"{time.perf_counter() - start:>6.1f} s  in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
