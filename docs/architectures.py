"""Writes the tables of architectures into `docs/architectures.md`, out of what the tests run and what the engine says.

    python docs/architectures.py

Which architectures are run, over how many stages and shards, and what is special about each stays in
`tests/engine/architectures.py`; why one is refused is what the engine says when it is asked. `tests/engine/test_engine_page.py`
fails when the page is old.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.engine.catalogue import make_catalogue
from spotserve.engine.selfcheck import check
from spotserve.engine.stages import library_maker

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architectures.md")


def served_table(tested: ModuleType) -> str:
    """One row per architecture that the tests run."""
    rows = ["| architecture | `model_type` | stages | shards | notes |", "|---|---|---|---|---|"]
    for item in tested.SERVED:
        pipelines, tensors = (tested.PIPELINES, tested.TENSORS) if item.every_cut else (tested.PIPELINES[-1:], tested.TENSORS[-1:])
        rows.append(f"| {item.title} | `{item.model_type}` | {_listed(pipelines)} | {_listed(tensors)} | {item.notes} |")
    return "\n".join(rows)


def refused_table(tested: ModuleType, scene: ModuleType) -> str:
    """One row per architecture that is refused, in the engine's words."""
    rows = ["| architecture | `model_type` | what the engine says |", "|---|---|---|"]
    for model_type, (title, settings) in tested.REFUSED.items():
        rows.append(f"| {title} | `{model_type}` | {reason(scene, model_type, settings)} |")
    return "\n".join(rows)


def reason(scene: ModuleType, model_type: str, settings: dict[str, object]) -> str:
    """Why a tiny model of this type is not served.

    Raises:
        AssertionError: it is.
    """
    try:
        catalogue = make_catalogue(scene.tiny_config(model_type, **settings), name="", dtype=torch.float32)
    except ModelError as error:
        return str(error).removeprefix(": ")
    verdict = check(catalogue, 1, library_maker(EngineSettings()), dtype=torch.float32, kind="page")
    assert verdict is not None, f"{model_type} is served"
    return verdict


def filled(page: str) -> str:
    """The page with both tables as they are now."""
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    try:
        tested, scene = _module("architectures"), _module("stage_scene")
    finally:
        sys.path.pop(0)
    for name, table in (("served", served_table(tested)), ("refused", refused_table(tested, scene))):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, marker, after = rest.partition(end)
        assert marker, f"the page has no {begin} ... {end}"
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "tests" / "engine" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
