"""What the command line says: errors and warnings in one line, in its own words."""

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Any, Optional, TextIO, Union

if TYPE_CHECKING:
    from ..recall import Retrieval

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# How the library's messages name an argument: on_error='skip', resume=False, paddle.set_device('gpu').
_ARGUMENT = re.compile(
    r"\bpaddle\.set_(?P<setting>[a-z]+)\((?P<given>'[^']*')\)|\b(?P<name>[a-z_]+)=(?P<value>'[^']*'|True|False|[\d.e-]*\d)"
)


def one_line(message: Union[BaseException, Warning, str], parser: Optional[argparse.ArgumentParser] = None) -> str:
    """An exception or a message in one line, with the options of a command where it names arguments."""
    if isinstance(message, OSError) and message.filename:
        return f"{os.fspath(message.filename)}: {message.strerror}"
    text = " ".join(str(message).split()) or type(message).__name__
    return in_options(text, parser) if parser else text


def in_options(text: str, parser: argparse.ArgumentParser) -> str:
    """A message with `--option value` in place of each `argument=value` that the parser has an option for."""

    def option(match: re.Match[str]) -> str:
        name, value = match["name"] or match["setting"], match["value"] or match["given"]
        for action in parser._actions:
            if action.dest == name and action.option_strings and action.help != argparse.SUPPRESS:
                strings = [string for string in action.option_strings if string.startswith("--")]
                if value in ("True", "False"):
                    return next(
                        (string for string in strings if string.startswith("--no-") == (value == "False")), match[0]
                    )
                return f"{strings[0]} {value.strip(chr(39)) or value}"
        return match[0]

    return _ARGUMENT.sub(option, text)


def print_error(message: Union[BaseException, str], parser: Optional[argparse.ArgumentParser] = None) -> None:
    """Prints the one line of an error."""
    print(f"error: {one_line(message, parser)}", file=sys.stderr)


def retrieval_in_words(found: "Retrieval") -> str:
    """The figures of a `Retrieval` in one line."""
    recalls = (("captions of images", found.image_to_text), ("images of captions", found.text_to_image))
    listed = ", ".join(f"{what} {' '.join(f'{share:.1%}' for share in recall.values())}" for what, recall in recalls)
    ks = "/".join(map(str, found.image_to_text))
    return f"loss {found.loss:.4f}, recall@{ks}: {listed}"


def warning_printer(parser: argparse.ArgumentParser) -> Any:
    """A function for `warnings.showwarning`: one line for our own warnings, none for those of the libraries beneath."""

    def show(
        message: Union[Warning, str],
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Optional[TextIO] = None,
        line: Optional[str] = None,
    ) -> None:
        if os.path.abspath(filename).startswith(PACKAGE + os.sep):
            print(f"warning: {one_line(message, parser)}", file=sys.stderr)

    return show
