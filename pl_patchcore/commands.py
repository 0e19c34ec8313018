"""What ``pl-patchcore`` says of itself: its commands, its version, and its options in short. Imports no torch."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

import pl_patchcore

HELP_INDENT = 10  # characters before what an option does
COMMANDS = {  # name of a command, which is a method of `cli.Trainer`, but for export: what it does
    "fit": "Fit a model on nominal images.",
    "validate": "Test a fitted model on the validation set.",
    "test": "Test a fitted model on nominal and anomalous images.",
    "predict": "Score images with a fitted model.",
    "run": "Fit, then test, in one process.",
    "update": "Add nominal images to a fitted model.",
    "calibrate": "Set a fitted model's thresholds from other nominal images.",
    "benchmark": "Fit and test on every category of a data set.",
    "export": "Write a fitted model as one file that runs without this package.",
}
HELP = """\
usage: pl-patchcore {{{names}}} [options]

PatchCore anomaly detection: fit on images without defects, then find what differs from them.

commands:
{commands}

options:
  -h, --help   show this; after a command: its options
  --version    show the version
  -v           show what Lightning and other libraries say, too
  --print_completion SHELL
               print a script for bash, zsh or tcsh that completes options by tab (pip install shtab)
"""


def answered(words: Sequence[str]) -> bool:
    """Answer what needs no command: help, version, and words that begin with none. Returns whether that was all."""
    first = next((word for word in words if word != "-v"), "")
    if first in ("-h", "--help"):
        rows = (f"  {name:12} {text}" for name, text in COMMANDS.items())
        print(HELP.format(names=",".join(COMMANDS), commands="\n".join(rows)), end="")  # noqa: T201 - the answer
    elif first == "--version":
        print(f"pl-patchcore {pl_patchcore.__version__}")  # noqa: T201 - the answer
    elif not first:
        fail(f"give a command, {{{','.join(COMMANDS)}}}; pl-patchcore --help explains them.")
    elif first.startswith("--print_completion") or first in COMMANDS:
        return False
    elif first.startswith("-"):
        fail(f"the command comes first: pl-patchcore fit {' '.join(words)}.")
    else:
        alike = difflib.get_close_matches(first, COMMANDS, 1, 0)[0]
        fail(f"unknown command {first!r}; did you mean {alike!r}?")
    return True


def fail(text: str) -> NoReturn:
    """End the process with one line, status 2."""
    sys.stderr.write(f"pl-patchcore: error: {text}\n")
    raise SystemExit(2) from None


def shorten(text: str) -> str:
    r"""A parser's help without lists of classes, and with one sentence on each of Lightning's options.

    Example:
        >>> print(shorten("  --trainer.x X\n            One. Two. (type: a, default: b, known subclasses: c, d)\n"))
          --trainer.x X
                  One. (default: b)
        <BLANKLINE>
    """
    width, indent = max(40, shutil.get_terminal_size().columns - 2), " " * HELP_INDENT  # as argparse lays it out

    def brief(option: re.Match[str]) -> str:
        words = re.sub(r"\(type: [^()]*, default", "(default", " ".join(option[2].split()))
        first = re.match(r"(.*?\.)(?: .*?)?( \((?:type|default):.*\))?$", words)
        shown = f"{first[1]}{first[2] or ''}" if first else words
        return f"{option[1]}\n{textwrap.fill(shown, width, initial_indent=indent, subsequent_indent=indent)}\n"

    text = re.sub(r",\s+known\s+subclasses:[^()]*\)", ")", text)
    text = re.sub(
        r"\(type:\s+(?:Literal\[[^]]*\]|str|Union\[list\[Any\],\s+str,\s+null\]),\s+default", "(default", text
    )  # choices are shown before
    text = re.sub(r"^  --(?:model|trainer)\.\S+\.help .*\n(?: {10,}.*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(  --(?:trainer\.|ckpt_path)\S*.*)\n((?: {10,}.*\n?)+)", brief, text, flags=re.MULTILINE)
    hint = "Options of images of your own, such as --data.nominal: --data.help FolderDataModule\n"
    return text.replace("  --data CONFIG", f"  {hint}  --data CONFIG", 1)
