"""The folder by which processes of one system find each other."""

import stat
from pathlib import Path

import pytest

from spotserve.core.errors import ConfigError
from spotserve.core.messages import Address
from spotserve.system_folder import SystemFolder, SystemRecord, process_name, replace_file

RECORD = SystemRecord(pid=1, url="http://127.0.0.1:8000", controller=Address("127.0.0.1", 5), secret="s3cret")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_read_and_the_secret_lasts(tmp_path: Path) -> None:
    folder = SystemFolder(tmp_path / "deep" / "folder")
    folder.create()
    folder.create()
    assert folder.read() is None
    assert folder.secret() != folder.secret(), "made up afresh until it is written"
    folder.write(RECORD)
    assert folder.read() == RECORD
    assert folder.secret() == "s3cret"
    assert sorted(path.name for path in folder.path.iterdir()) == ["logs", "system.json"], "no drafts are left"


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    folder = SystemFolder(tmp_path / "folder")
    folder.create()
    folder.write(RECORD)
    assert mode(folder.path) == 0o700
    assert mode(folder.record_path) == 0o600


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "one"}'])
def test_a_broken_record_is_an_error_that_says_what_to_do(tmp_path: Path, content: str) -> None:
    folder = SystemFolder(tmp_path)
    folder.record_path.write_text(content)
    with pytest.raises(ConfigError, match="remove it to start afresh"):
        folder.read()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with pytest.raises(TypeError):
        replace_file(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def test_where_folders_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTSERVE_HOME", "/a")
    assert SystemFolder.for_port(80).path == Path("/a/80")
    monkeypatch.setenv("SPOTSERVE_HOME", "")
    monkeypatch.setenv("XDG_STATE_HOME", "/b")
    assert SystemFolder.for_port(80).path == Path("/b/spotserve/80")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "/c")
    assert SystemFolder.for_port(80).path == Path("/c/.local/state/spotserve/80")


def test_names_of_processes_are_as_long_as_the_kernel_keeps_them() -> None:
    assert process_name("i-1") == "spot:i-1"
    assert len(process_name("i-" + "9" * 40)) == 15
