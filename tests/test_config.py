"""Where settings come from, which of them wins, and that every mistake is named."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from spotserve.config import DEMO_MODEL, EngineSettings, load_settings
from spotserve.core.errors import ConfigError
from spotserve.worker.options import WorkerOptions


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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"instances": 0}, r"controller\.instances"),
        ({"instances": 65}, "max_instances is 64, but instances and on_demand_floor ask for 65"),
        ({"on_demand_floor": 3, "max_instances": 2}, "max_instances is 2"),
        ({"shortage_share": 1.0}, r"controller\.shortage_share"),
        ({"max_spares": -1}, r"controller\.max_spares"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_settings(controller=given)
    assert load_settings().controller.instances is None


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().gateway.port = 1  # type: ignore[misc]


def test_the_served_name() -> None:
    assert EngineSettings(model=str(DEMO_MODEL)).model_name == "spotserve-demo"
    assert EngineSettings(model="meta/llama").model_name == "llama"
    assert EngineSettings(model="meta/llama", served_name="mine").model_name == "mine"


KEY = "sk-nobody-may-see-this"


def remote(**settings: object) -> EngineSettings:
    return EngineSettings.model_validate({"kind": "openai", "url": "http://127.0.0.1:1/v1", "api_key": KEY, **settings})


def test_a_key_reaches_a_worker_and_nobody_else() -> None:
    settings = remote()
    sections: dict[str, Any] = {"engine": settings.for_worker(), "worker": {}, "store": {}}
    options = WorkerOptions(instance_id="i-1", spot=True, zone="z", system_folder="/tmp", **sections)
    arrived = msgspec.json.decode(msgspec.json.encode(options), type=WorkerOptions).engine_settings()
    assert arrived == settings
    assert arrived.api_key is not None and arrived.api_key.get_secret_value() == KEY
    shown = (repr(settings), str(settings), repr(options), str(options), f"{options}", str(settings.model_dump(mode="json")))
    assert not any(KEY in text for text in shown)


@pytest.mark.parametrize("wrong", [{"api_key": KEY}, {"api_key": KEY, "kind": "openai"}, {"api_key": KEY, "max_batch": 0}])
def test_a_mistake_beside_a_key_does_not_say_the_key(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(engine={**wrong, "url": None if "kind" in wrong else "http://127.0.0.1:1/v1"})
    told = "".join(traceback.format_exception(refused.value))
    assert KEY not in told
    monkeypatch.setenv("SPOTSERVE_ENGINE", f'{{"api_key": ["{KEY}"]}}')
    with pytest.raises(ConfigError, match=r"engine\.api_key") as refused:
        load_settings()
    assert KEY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("given", [{"kind": "openai"}, {"url": "http://127.0.0.1:1/v1"}])
def test_a_server_and_its_url_belong_together(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--engine-url"):
        load_settings(engine=given)


def test_a_server_as_engine_needs_no_torch() -> None:
    program = (
        "import sys; from spotserve.engine.remote.remote_engine import RemoteEngine; import spotserve.worker.engine_thread; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
