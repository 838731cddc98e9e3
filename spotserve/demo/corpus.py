"""The text that the demo models learn from: the sources of the Python standard library, which every machine with Python has.

Two kinds of documents come out of it: whole files, and *pairs* of a docstring and the function it describes, which are
what the chat template turns into a user's question and an assistant's answer. Whether a file is held out is decided by a
hash of its name, so that training and measuring agree without a list. Knows nothing of torch.
"""

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.03
"""Share of files that no model ever trains on."""

MAX_FILE_BYTES = 400_000
"""Larger files are tables (encodings, generated parsers), not code that a person wrote."""

MAX_ANSWER_BYTES = 2_000
"""Longer functions do not fit the demo model's context together with their question."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A docstring's first sentence and the source of the function that carries it."""

    question: str
    answer: str


def source_files() -> list[Path]:
    """Every Python source of the running interpreter's standard library, in a stable order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    return [
        path for path in sorted(root.rglob("*.py")) if not skipped.intersection(path.parts) and path.stat().st_size < MAX_FILE_BYTES
    ]


def is_held_out(path: Path) -> bool:
    """True for the files that training must not see; depends on the file's name alone."""
    digest = hashlib.sha256(path.name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def read_texts(*, held_out: bool) -> Iterator[str]:
    """The text of every file on one side of the split; files that are not valid UTF-8 (some tests) are passed over."""
    for path in source_files():
        if is_held_out(path) is held_out:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def read_pairs(text: str) -> Iterator[Pair]:
    """The (docstring, function) pairs of one file; none for a file that this interpreter cannot parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if docstring and len(source) <= MAX_ANSWER_BYTES:
            question = docstring.split("\n\n")[0].replace("\n", " ")
            yield Pair(f"Write a function `{node.name}`. {question}", source)
