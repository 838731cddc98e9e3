"""Writes the tables of settings and of metrics into `docs/operate.md`, out of the code that they describe.

    python docs/tables.py

The names, defaults and meanings stay in `spotserve/config.py` and `spotserve/metrics.py`; the page holds a copy between two
comments, and `tests/test_docs.py` fails when the copy is old. Knows the two modules and Markdown.
"""

import ast
import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from spotserve import config
from spotserve.metrics import Metrics

PAGE = Path(__file__).with_name("operate.md")


def settings_table() -> str:
    """One row per setting: section and name, environment variable, default, meaning."""
    rows = ["| setting | environment variable | default | meaning |", "|---|---|---|---|"]
    for section, holder in config.Settings.model_fields.items():
        kind = holder.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        written = _attribute_docstrings(kind.__name__)
        for name, field in kind.model_fields.items():
            key = f"{section}.{name}"
            meaning = written[name]
            variable = f"SPOTSERVE_{section}__{name}".upper()
            rows.append(f"| `{key}` | `{variable}` | {_default(key, field.default)} | {_cell(meaning)} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """One row per metric: name, kind, labels, meaning."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in vars(Metrics()).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            described = metric.describe()[0]
            suffix = "_total" if isinstance(metric, Counter) else ""
            labels = ", ".join(f"`{name}`" for name in metric._labelnames) or "–"
            rows.append(f"| `{described.name}{suffix}` | {described.type} | {labels} | {_cell(described.documentation)} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with both tables as the code has them now."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, marker, after = rest.partition(end)
        assert marker, f"the page has no {begin} ... {end}"
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def _attribute_docstrings(class_name: str) -> Mapping[str, str]:
    """The strings below the fields of a class of `config.py`, by field."""
    assert config.__file__ is not None
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _default(key: str, value: object) -> str:
    if key == "engine.model":
        return "the model that ships"
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
