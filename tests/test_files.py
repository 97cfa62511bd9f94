"""Durable writes, names and JSON from elsewhere, locks, and the cache folder."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from file_systems import refuse
from paths import ROOT
from training_helpers import make_data, snapshot, train_here

from gpt import files
from gpt.errors import IntegrityError, ResourceError
from gpt.files import (
    cache_folder,
    inside,
    is_folder,
    lock_file,
    lock_folder,
    make_private,
    read_json,
    remove_tree,
    set_mode,
    write_durably,
)

# ---- writing


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("first\nnaïve 雨", ""):
        write_durably(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert os.listdir(tmp_path) == ["x.txt"]


def test_fault_042_the_order_is_write_sync_rename_sync_of_the_folder(tmp_path, monkeypatch):
    calls = []

    def watched(name, act):
        def call(target, *more):
            kind = stat.S_ISDIR(os.fstat(target).st_mode) if name == "fsync" else (tmp_path / "x").exists()
            calls.append((name, kind))
            return act(target, *more)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    write_durably(tmp_path / "x", "text")
    assert calls == [("fsync", False), ("replace", False), ("fsync", True)]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_fault_041_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "new")
    assert (os.listdir(tmp_path), path.read_text()) == (["x.txt"], "old")


def test_fault_117_a_link_in_place_of_the_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "x.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        write_durably(tmp_path / "x", "new")
    assert (tmp_path / "target").read_text() == "mine"
    write_durably(tmp_path / "x", "new")  # the link has gone
    assert (tmp_path / "x").read_text() == "new"


def test_fault_117_only_the_owner_may_write_to_files(tmp_path):
    mask = os.umask(0)
    try:
        write_durably(tmp_path / "x", "text")
        with lock_folder(tmp_path):
            modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "lock")]
    finally:
        os.umask(mask)
    assert [mode & 0o022 for mode in modes] == [0, 0]


def test_a_link_to_a_folder_is_removed_and_the_folder_is_not(tmp_path):
    (tmp_path / "kept" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").touch()
    for name in ("link", "absent", "file"):
        remove_tree(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
    remove_tree(tmp_path / "kept")
    assert os.listdir(tmp_path) == []


# ---- file systems that refuse


@pytest.mark.parametrize("answer", ["EINVAL", "EIO", "ENOTSUP", "ENOSYS"])
def test_fault_122_a_folder_that_cannot_be_flushed_is_one_warning_for_any_number_of_files(
    tmp_path, monkeypatch, capsys, answer
):
    refuse(monkeypatch, fsync=answer)
    for name in ("a", "b", "c"):
        write_durably(tmp_path / name, name)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["a", "b", "c"]
    reason = os.strerror(getattr(errno, answer))
    assert capsys.readouterr().err == (
        f"warning: this file system does not flush folders ({reason}): "
        "after a power cut the newest files may be missing\n"
    )


@pytest.mark.parametrize("answer", ["ENOSPC", "EDQUOT"])
def test_fault_122_a_folder_for_which_the_disk_is_full_is_still_an_error(tmp_path, monkeypatch, answer):
    refuse(monkeypatch, fsync=answer)
    with pytest.raises(OSError) as caught:
        write_durably(tmp_path / "x", "new")
    assert caught.value.errno == getattr(errno, answer)


@pytest.mark.parametrize("answer", ["EINVAL", "EIO", "ENOTSUP"])
def test_fault_122_a_file_that_cannot_be_flushed_stays_an_error(tmp_path, monkeypatch, answer):
    def fail(_descriptor):
        raise OSError(getattr(errno, answer), "no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_durably(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == []


def test_fault_122_permissions_that_cannot_be_set_are_one_warning(tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, chmod="EPERM")
    for name in ("a", "b"):
        (tmp_path / name).touch()
        set_mode(tmp_path / name, 0o600)
    assert re.fullmatch(r"warning: .* does not change permissions \(.*\): .*\n", capsys.readouterr().err)


# ---- a locked folder that goes away


@pytest.mark.parametrize("what", ["folder", "lock", "folder_replaced", "lock_replaced", "folder_gone"])
def test_fault_120_a_locked_folder_or_lock_that_is_deleted_moved_or_replaced_is_noticed(tmp_path, what):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    with lock_folder(folder) as check:
        check()
        if what == "folder_gone":
            shutil.rmtree(folder)
        else:
            (folder if what.startswith("folder") else folder / "lock").rename(away)
        if what == "folder_replaced":
            folder.mkdir()
            (folder / "lock").touch()
        if what == "lock_replaced":
            (folder / "lock").touch()
        place = folder / "lock" if what.startswith("lock") else folder
        with pytest.raises(ResourceError, match=rf"^{re.escape(str(place))}: was deleted, moved or replaced"):
            check()
        if what == "folder":
            away.rename(folder)  # moved back
            check()


def test_fault_120_a_folder_that_only_changes_inside_is_the_same(tmp_path):
    with lock_folder(tmp_path) as check:
        (tmp_path / "x").write_text("new")
        (tmp_path / "x").rename(tmp_path / "y")
        tmp_path.chmod(0o755)
        check()


def test_fault_120_where_inodes_change_by_themselves_nothing_is_noticed_and_nothing_fails(tmp_path, monkeypatch):
    numbers = iter(range(10**6))
    monkeypatch.setattr(os.path, "samestat", lambda a, b: next(numbers) > 10**5)
    with lock_folder(tmp_path) as check:
        (tmp_path / "lock").unlink()
        check()


# ---- reading


@pytest.mark.parametrize("data", [b"{", b"\xff{}", b"[1]", b"7", b"", b"[" * 100_000])
def test_json_that_is_no_object_is_an_integrity_error(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.json: not (valid JSON|a JSON object)"):
        read_json(path)


def test_json_is_read_up_to_a_limit_and_may_be_absent(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "雨"}))
    assert read_json(path) == {"a": "雨"}
    assert read_json(tmp_path / "absent") is None
    assert read_json(path / "below a file") is None
    with pytest.raises(ResourceError, match="directory"):
        read_json(tmp_path)
    monkeypatch.setattr(files, "JSON_LIMIT", path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=rf"{path.stat().st_size} bytes, at most"):
        read_json(path)


def test_fault_111_any_text_may_be_checked_for_a_folder(tmp_path):
    assert is_folder(tmp_path)
    assert not any(map(is_folder, ["x" * 5000, tmp_path / ("y" * 300), "nul\x00", "", tmp_path / "absent"]))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", ".", "", "a\\b", "a\0", "C:x", 7, None])
def test_fault_108_a_name_that_leaves_its_folder_is_an_integrity_error(tmp_path, name):
    with pytest.raises(IntegrityError, match="leaves its directory"):
        inside(tmp_path, name)


def test_a_relative_name_stays_in_its_folder(tmp_path):
    assert inside(tmp_path, "training/state..json") == tmp_path / "training" / "state..json"


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from gpt.errors import run_main
from gpt.files import lock_folder
def main():
    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
run_main(main)
"""


def start_holder(folder):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def holder(tmp_path):
    """Returns a process that holds the lock of tmp_path / "out"."""
    (tmp_path / "out").mkdir()
    process = start_holder(tmp_path / "out")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_fault_039_a_second_program_in_a_folder_ends_with_5_naming_the_first(holder, tmp_path):
    out = tmp_path / "out"
    second = start_holder(out)
    stdout, stderr = second.communicate(timeout=30)
    assert (second.returncode, stdout) == (5, "")
    said = (
        rf"error: {out}: in use by pid {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait for it or give "
    )
    assert re.match(said, stderr)


def test_fault_039_a_second_run_changes_nothing_in_the_first_ones_folder(holder, tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    (out / "exit.json").write_text("{}")
    before = snapshot(out)
    run = train_here("tiny", "--data", data, "--out", out, "--max_steps", 1, "--warmup_steps", 0)
    assert run.code == 5
    assert run.last.startswith(f"error: {out}: in use by pid {holder.pid} on ")
    assert snapshot(out) == before


def test_fault_039_the_lock_of_a_killed_program_is_free_and_that_of_one_that_ended_too(holder, tmp_path):
    out = tmp_path / "out"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        third = start_holder(out)
        assert third.stdout.readline() == "held\n"
        assert f"pid {third.pid} on" in (out / "lock").read_text()
        assert third.communicate("") == ("", "")
        assert third.returncode == 0


def test_fault_117_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(ResourceError, match=r"lock: cannot be opened .*; remove it"), lock_folder(tmp_path):
        raise AssertionError("the lock was taken")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_folder(tmp_path):
        assert "No locks available" in capsys.readouterr().err


def test_a_lock_can_be_waited_for_and_is_free_once_the_last_process_has_closed_the_file(tmp_path):
    path = tmp_path / "x.lock"
    with open(path, "ab") as first, open(path, "ab") as second:
        assert lock_file(first)
        assert not lock_file(second)
        heir = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"], stdin=first)
        first.close()
        assert not lock_file(second)
        assert lock_file(second, wait_seconds=60)
        assert heir.poll() == 0 or heir.wait(5) == 0


# ---- the cache


def test_the_cache_folder_follows_xdg_cache_home_if_that_is_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gpt-text-generator"
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "me" / ".cache" / "gpt-text-generator"


def test_without_a_home_folder_there_is_no_cache_folder(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", fail)
    assert cache_folder() is None


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_fault_117_only_the_owner_may_enter_new_folders_and_old_ones_keep_their_mode(tmp_path):
    tmp_path.chmod(0o755)
    mask = os.umask(0)
    try:
        for _ in range(2):
            make_private(tmp_path / "a" / "b")
    finally:
        os.umask(mask)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")]
    assert modes == [0o755, 0o700, 0o700]
