"""Where settings come from, which of them wins, and that every mistake is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from spotserve.config import DEMO_MODEL, EngineSettings, load_settings
from spotserve.core.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOTSERVE_CONFIG", raising=False)


def write(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(text)
    monkeypatch.setenv("SPOTSERVE_CONFIG", str(path))


def test_flag_before_environment_before_file_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.toml", "[gateway]\nport = 1\nmax_queued = 2\nkeep_alive_s = 3\n", monkeypatch)
    monkeypatch.setenv("SPOTSERVE_GATEWAY__PORT", "10")
    monkeypatch.setenv("SPOTSERVE_GATEWAY__MAX_QUEUED", "20")
    gateway = load_settings(gateway={"port": 100, "max_queued": None}).gateway
    assert (gateway.port, gateway.max_queued, gateway.keep_alive_s, gateway.host) == (100, 20, 3, "127.0.0.1")


def test_other_variables_of_the_program_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "URL", "SECRET"):
        monkeypatch.setenv(f"SPOTSERVE_{name}", "something")
    load_settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gateway]\nprot = 1\n", "gateway.prot"),
        ("[gatway]\nport = 1\n", "gatway"),
        ("[gateway]\nport = 70000\n", "70000"),
        ("[gateway\n", "line 1"),
        ("[cloud]\nzones = []\n", "cloud.zones"),
        ("[engine]\nspeculation = 'ngram:0'\n", "engine.speculation"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    write(tmp_path / "a.toml", text, monkeypatch)
    with pytest.raises(ConfigError, match=says):
        load_settings()


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_settings()


def test_a_mistake_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_GATEWAY", "no JSON")
    with pytest.raises(ConfigError, match="gateway"):
        load_settings()


def test_several_mistakes_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.port.*cloud\.instances"):
        load_settings(gateway={"port": -1}, cloud={"instances": 0})


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().gateway.port = 1  # type: ignore[misc]


def test_the_served_name() -> None:
    assert EngineSettings(model=str(DEMO_MODEL)).model_name == "spotserve-demo"
    assert EngineSettings(model="meta/llama").model_name == "llama"
    assert EngineSettings(model="meta/llama", served_name="mine").model_name == "mine"
