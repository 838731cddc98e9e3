"""Three kinds of text for benchmarks, from files that no model that ships was trained on.

How well one can guess ahead depends on the text more than on anything else.
"""

import ast
from collections.abc import Iterator

from spotserve.demo.corpus import read_texts

REPEATED_LINES = 4
REPEATS = 3


def texts_by_kind() -> dict[str, list[str]]:
    """Code as it is, code that repeats itself, and prose (docstrings)."""
    code = list(read_texts(held_out=True))
    return {
        "repeating code": ["".join(_repeated(text)) for text in code],
        "fresh code": code,
        "prose": [prose for text in code if len(prose := "\n\n".join(_docstrings(text))) > 200],
    }


def _repeated(text: str) -> Iterator[str]:
    """Every few lines, again and again, like tables, tests and boilerplate."""
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    for start in range(0, len(lines), REPEATED_LINES):
        yield "".join(lines[start : start + REPEATED_LINES]) * REPEATS


def _docstrings(text: str) -> Iterator[str]:
    """Of a file; none when this interpreter cannot parse it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            yield docstring
