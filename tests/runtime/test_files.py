"""Files are complete or absent, and a folder has one writer."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from fused_mos.runtime import UserError, files

LOCK = """
import sys, time
from pathlib import Path
from fused_mos.runtime import files
lock = files.FolderLock(Path(sys.argv[1]))
"""
HOLD = (
    LOCK
    + """
print("locked", flush=True)
time.sleep(60)
"""
)


@pytest.fixture
def other_writer(tmp_path):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), files.writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_content_and_name_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    events, path = [], tmp_path / "x"
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("renamed") or replace(old, new))
    files.write_text(path, "text")
    assert events == [f"{path}.partial", "renamed", str(tmp_path)]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk that holds {path} is full; free space and run the same command to continue"),
        (errno.EACCES, "{path}: Permission denied"),
    ],
)
def test_a_failure_is_explained_and_leaves_the_old_file(number, message, tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write_text(path, "old")

    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(files.FileError) as error:
        files.write_text(path, "new")
    assert str(error.value) == message.format(path=path) and isinstance(error.value, UserError)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_appends_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "list.json"
    threads = [threading.Thread(target=files.append_json, args=(path, i)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(path.read_text())) == list(range(16))


@pytest.mark.processes
def test_a_second_writer_is_refused_and_told_of_the_first(other_writer, tmp_path):
    with pytest.raises(files.FolderInUse) as error:
        files.FolderLock(tmp_path / "run")
    assert f"{tmp_path / 'run'} is being written by process {other_writer.pid} on" in str(error.value)
    assert "wait for it, or stop it" in str(error.value)
    other_writer.kill()
    other_writer.wait()
    files.FolderLock(tmp_path / "run").release()  # a dead process holds nothing


def test_a_process_may_lock_what_it_has_locked(tmp_path):
    def locked_for_others():
        result = subprocess.run([sys.executable, "-c", LOCK, str(tmp_path)], capture_output=True, text=True)
        assert result.returncode == 0 or "FolderInUse" in result.stderr
        return result.returncode != 0

    outer = files.FolderLock(tmp_path)
    with files.FolderLock(tmp_path / "." / ""):
        pass
    assert locked_for_others()
    outer.release()
    outer.release()
    lock = files.FolderLock(tmp_path)
    del lock  # as by an exception on the way
    assert not locked_for_others()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(files.FileError, match="file/run.*Not a directory"):
        files.FolderLock(tmp_path / "file" / "run")


def test_a_file_system_without_locks_keeps_nobody_from_working(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    for value in range(2):
        files.append_json(tmp_path / "list.json", value)
    with files.FolderLock(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "list.json").read_text()) == [0, 1]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and warnings[-1].startswith(f"warning: {tmp_path / 'run'} cannot be locked (")


def test_the_cache_of_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", no_home)
    assert files.cache_folder().name == f"fused_mos-{os.getuid()}"
