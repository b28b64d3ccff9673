"""The help of the commands in Chinese. Errors and warnings stay English: they are the library's."""

import argparse
import os

_FILE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", "help_zh.tsv")
_HEADINGS = {"positional arguments": "位置参数", "optional arguments": "选项", "options": "选项"}


def is_wanted() -> bool:
    """Whether the locale is Chinese, by LC_ALL, LC_MESSAGES or LANG, whichever comes first."""
    values = map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, values), "").startswith("zh")


def catalogue() -> dict[str, str]:
    """{English: Chinese} of every text of the help but the examples."""
    with open(_FILE, encoding="utf-8") as file:
        return dict(line.rstrip("\n").split("\t") for line in file)


def translate(parser: argparse.ArgumentParser) -> None:
    """Puts Chinese in the place of the help of a parser and its commands; what the catalogue lacks stays as it is."""
    texts = catalogue()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for listed in commands._choices_actions:
        child, listed.help = commands.choices[listed.dest], texts.get(listed.help or "", listed.help)
        child.description = f"{listed.help}。"
        child.epilog = (child.epilog or "").replace("examples:", "例子：", 1)
    parser.description = texts.get(parser.description or "", parser.description)
    parser.epilog = texts.get(parser.epilog or "", parser.epilog)
    for each in (parser, *commands.choices.values()):
        for group in each._action_groups:
            group.title = _HEADINGS.get(group.title or "", group.title)
        for action in each._actions:
            action.help = texts.get(action.help or "", action.help)
