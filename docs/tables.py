"""Writes tables into the documents, out of the code that they describe: settings, metrics, machines that the planner knows.

    python docs/tables.py

The names, defaults and meanings stay in `spotserve/config.py`, `spotserve/metrics.py` and `spotserve/planner/devices.py`; a page
holds a copy between two comments, and `tests/test_docs.py` fails when the copy is old. Knows these modules and Markdown.
"""

import ast
import json
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from spotserve import config
from spotserve.metrics import Metrics
from spotserve.planner.devices import DEVICES, INSTANCES, device_type, price_usd_per_hour


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


def devices_table() -> str:
    """One row per known device: its memory, the three constants that planning starts from, where they are from."""
    rows = [
        "| device | memory, GiB | 16-bit Tflop/s | memory, GB/s | overhead of a layer, us | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, known in DEVICES.items():
        device = device_type(name)
        figures = (
            f"{device.flops_per_s / 1e12:.0f}",
            f"{device.memory_bytes_per_s / 1e9:.0f}",
            f"{device.layer_overhead_s * 1e6:.0f}",
        )
        rows.append(f"| {name} | {device.memory_bytes / 2**30:.0f} | {' | '.join(figures)} | {_cell(known.source)} |")
    return "\n".join(rows)


def machines_table() -> str:
    """One row per known machine: devices, links, and what it costs where its prices are known best."""
    rows = [
        "| machine | devices | between them, GB/s | network, GB/s | spot, USD/h | on demand, USD/h |",
        "|---|---|---|---|---|---|",
    ]
    for name, known in INSTANCES.items():
        between = "–" if known.num_devices == 1 else f"{known.device_link.bytes_per_s / 1e9:.3g}"
        spot = f"{price_usd_per_hour(name, spot=True):.3g}" if known.spot_usd_per_hour else "not known"
        on_demand = f"{price_usd_per_hour(name, spot=False):.4g}"
        network = f"{known.network.bytes_per_s / 1e9:.3g}"
        rows.append(f"| `{name}` | {known.num_devices} x {known.device} | {between} | {network} | {spot} | {on_demand} |")
    return "\n".join(rows)


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "operate.md": {"settings": settings_table, "metrics": metrics_table},
    "planning.md": {"devices": devices_table, "machines": machines_table},
}
"""By page, what is between which two comments."""


def filled(page: str, name_of_page: str) -> str:
    """The page with its tables as the code has them now."""
    for name, table_of in PAGES[name_of_page].items():
        table = table_of()
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
    for name_of_page in PAGES:
        path = Path(__file__).with_name(name_of_page)
        path.write_text(filled(path.read_text(encoding="utf-8"), name_of_page), encoding="utf-8")
    sys.exit(0)
