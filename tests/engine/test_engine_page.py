"""The page of architectures says what the tests run and what the engine says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_architectures_is_as_the_code_has_it() -> None:
    spec = importlib.util.spec_from_file_location("architectures_page", ROOT / "docs" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert script.filled(page) == page, "run: python docs/architectures.py"
