"""The documentation: its code runs, its Chinese pages have the code of the English pages, its links lead somewhere."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

import paddle_clip
from paddle_clip import cli

sys.path.insert(0, os.path.join(ROOT, "docs"))
import make_api

DOCS = Path(ROOT, "docs")
NAMES = sorted(path.stem for path in DOCS.glob("*.md") if not path.stem.endswith("_cn"))
PAGES = [*sorted(DOCS.glob("*.md")), Path(ROOT, "README.md"), Path(ROOT, "README_cn.md")]
MOST_NOT_RUN = 6  # blocks of all English pages together

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A block of code in a page."""

    place: str  # file and line
    line: int
    language: str
    code: str
    reason: str  # why it is not run, or None


def blocks(path):
    text = path.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(f"{path.name}:{line + 1}", line, match["language"], match["code"], match["reason"])


def commands(code):
    """The commands of a block of shell code, as lists of words, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def without_comments(block):
    """The code of a block without its comments."""
    if block.language == "python":
        return ast.dump(ast.parse(block.code))
    return commands(block.code) if block.language == "bash" else block.code


@pytest.fixture(params=NAMES)
def page(request):
    return DOCS / f"{request.param}.md"


def run_page(page):
    """Runs a page's blocks one after the other, in this folder and one namespace."""
    namespace = {"__name__": "docs"}
    for block in blocks(page):
        if block.reason:
            continue
        if block.language == "python":  # with the page's line numbers in tracebacks
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        elif block.language == "bash":
            for program, *arguments in commands(block.code):
                assert program == "paddle-clip", f"{block.place}: {program} cannot be run here"
                assert cli.main(arguments) == 0, f"{block.place} fails"


def test_code(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "num_workers" not in page.read_text(encoding="utf-8"):
        run_page(page)
        return
    # In pytest's process a DataLoader with workers, and later a child process, ended in a segmentation fault.
    code = f"import sys; sys.path.insert(0, {os.path.join(ROOT, 'tests')!r})\n"
    code += f"import test_docs; test_docs.run_page(test_docs.DOCS / {page.name!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_runs_offline(tmp_path, monkeypatch, capsys):
    """The commands of the README, but for those that install and those on files of OpenAI."""
    for name in ("convert", "paddle_clip"):
        (tmp_path / name).symlink_to(Path(ROOT, name))
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks(Path(ROOT, "README.md")):
        for program, *arguments in commands(block.code) if block.language == "bash" else ():
            if program in ("cd", "pip") or "RN50.pt" in arguments:
                continue
            ran += 1
            if program == "python":
                subprocess.run([sys.executable, *arguments], check=True)
            else:
                assert cli.main(arguments) == 0, f"{block.place}: {capsys.readouterr().err}"
    assert ran >= 8


@pytest.mark.parametrize(
    "page", [DOCS / f"{name}.md" for name in NAMES] + [Path(ROOT, "README.md")], ids=lambda path: path.stem
)
def test_languages_have_the_same_code(page):
    chinese = list(blocks(page.with_name(f"{page.stem}_cn.md")))
    for english, translated in zip(blocks(page), chinese):
        code, translation = without_comments(english), without_comments(translated)
        assert (english.language, code) == (translated.language, translation), (english.place, translated.place)
        assert english.reason == translated.reason, (english.place, translated.place)
    assert len(chinese) == len(list(blocks(page)))


def test_the_reference_is_made_of_the_docstrings():
    assert set(make_api.TOPICS) == set(paddle_clip._ROOM_OF.values())
    for language, name in enumerate(("api.md", "api_cn.md")):
        current = (DOCS / name).read_text(encoding="utf-8")
        assert current == make_api.page(language), f"{name} is out of date: run python docs/make_api.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: os.path.relpath(path, ROOT))
def test_paddle_2_takes_the_order_of_imports(path):
    """Paddle 2 that is imported before Python's zlib crashes Pillow. In this process zlib is there already."""
    lines = [line for block in blocks(path) if block.language == "python" for line in block.code.splitlines()]
    imported = [re.split(r"[\s.]+", line)[1] for line in lines if re.match("(import|from) ", line)]
    assert "paddle" not in imported or imported.index("paddle_clip") < imported.index("paddle")


def test_few_blocks_are_not_run():
    found = [block for name in NAMES for block in blocks(DOCS / f"{name}.md")]
    not_run = [block.place for block in found if block.reason]
    assert len(not_run) <= MOST_NOT_RUN, not_run
    # Nothing that looks like a block or a mark escapes.
    text = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in NAMES)
    assert text.count("<!-- not run") == len(not_run), "a mark has no reason, or no block after it"
    assert text.count("```") == 2 * len(found)
    assert {block.language for block in found} == {"python", "bash"}


def test_every_page_has_both_languages_and_is_in_the_index():
    for suffix in ("", "_cn"):
        linked = set(_LINK.findall((DOCS / f"README{suffix}.md").read_text(encoding="utf-8")))
        for name in NAMES:
            assert (DOCS / f"{name}{suffix}.md").is_file()
            assert name == "README" or f"{name}{suffix}.md" in linked
    assert len(list(DOCS.glob("*.md"))) == 2 * len(NAMES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: os.path.relpath(path, ROOT))
def test_links(path):
    text = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            assert not anchor, f"{target}: headings change, and nothing here checks them"
            assert (path.parent / file).exists(), f"{path.name} links to {target}, which is not there"


@pytest.mark.parametrize("name", NAMES)
def test_languages_link_to_each_other(name):
    for page, other in ((f"{name}.md", f"{name}_cn.md"), (f"{name}_cn.md", f"{name}.md")):
        top = (DOCS / page).read_text(encoding="utf-8").split("\n## ")[0]
        assert other in _LINK.findall(top), f"{page} has no link to {other} at its top"
