"""The structure of the package, its imports, its types and the length of its functions, and the scripts' imports."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = Path(ROOT, "paddle_clip")
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 80  # lines of code in a function
LONG, MOST_LONG = 40, 12  # lines of code, and the number of functions that may have more


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
IDS = {"ids": sorted(MODULES)}


def imports(path):
    """Names of the modules that a file imports, within functions too, but not for type checkers alone."""
    found, module = set(), module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def test_there_are_no_circles():
    """A module can be understood by itself and the modules below it."""
    done, below = set(), {module: found & MODULES.keys() - {"paddle_clip"} for module, found in IMPORTS.items()}

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in below[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_checkpoints_import_neither_paddle_nor_torch():
    for module, found in IMPORTS.items():
        tops = {name.split(".")[0] for name in found}
        assert "torch" not in tops, module
        if module.startswith("paddle_clip.checkpoints"):
            assert "paddle" not in tops, module


def test_reading_checkpoints_takes_numpy_alone(tmp_path):
    modules = ", ".join(module for module in MODULES if module.startswith("paddle_clip.checkpoints"))
    script = (
        f"import sys; sys.modules.update(paddle=None, torch=None, PIL=None, tqdm=None, filelock=None); import {modules}"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)


def test_nobody_imports_the_command_line():
    for module, found in IMPORTS.items():
        if not module.startswith("paddle_clip.cli") and module != "paddle_clip.__main__":
            assert not [name for name in found if name.startswith("paddle_clip.cli")], module


def test_the_command_line_imports_neither_numpy_nor_paddle_at_its_top():
    for module, path in MODULES.items():
        if module.startswith("paddle_clip.cli"):
            top = ast.parse(path.read_text(encoding="utf-8")).body
            names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
            assert not {"numpy", "paddle", "tqdm", "PIL"} & set(names), module


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", FILES, **IDS)
def test_every_function_is_typed(path):
    for node in functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [argument.arg for argument in arguments if argument.annotation is None]
        assert set(untyped) <= {"self", "cls"}, f"{node.name}: {untyped}"
        assert node.returns is not None or node.name == "__init__", node.name


def lines_of_code(node, text):
    """The number of lines of a function without its docstring, comments and blank lines."""
    start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
    head = text[node.lineno - 1 : node.body[0].lineno - 1]
    body = text[start - 1 : node.end_lineno]
    return sum(1 for line in [*head, *body] if line.strip() and not line.strip().startswith("#"))


def test_functions_are_short():
    lengths = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8").splitlines()
        for node in functions(path):
            lengths[f"{os.path.relpath(path, ROOT)}:{node.name}"] = lines_of_code(node, text)
    long = {name: length for name, length in lengths.items() if length > LONG}
    assert max(lengths.values()) <= LONGEST, long
    assert len(long) <= MOST_LONG, long


FOLDERS = "benchmarks", "convert", "examples"
SCRIPTS = {path.stem: path for folder in FOLDERS for path in sorted(Path(ROOT, folder).glob("*.py"))}


def names_in(path):
    """What a file binds at its top, imports too."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        else:
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_take_from_each_other_what_is_there(path):
    """A name that moved is found here: most benchmarks take too long to run in the tests."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & SCRIPTS.keys()
    taken = {
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            taken |= {(node.module, alias.name) for alias in node.names}
    for module, name in taken:
        assert name in names_in(SCRIPTS[module]), f"{module}.{name}"


def test_contributing_lists_every_file():
    listed = set(re.findall(r"^ *(\S+\.py) ", Path(ROOT, "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.name for path in FILES} - {"__init__.py", "__main__.py"} <= listed
