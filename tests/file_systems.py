"""Stand-ins for file systems that refuse what most allow: cloud drives, network shares, FAT, WSL."""

import errno
import os
import runpy
import stat
from pathlib import Path

import pytest

from gpt.files import warn_refused


def refuse(monkeypatch, **answers):
    """Makes system calls fail: refuse(patch, fsync="EINVAL", chmod="EPERM", symlink="EOPNOTSUPP", flock="ENOLCK").
    `fsync` is that of folders alone. Every warning of a refusal is printed again."""
    warn_refused.cache_clear()
    real = os.fsync

    def failing(name):
        def fail(*_args, **_keywords):
            code = getattr(errno, answers[name])
            raise OSError(code, os.strerror(code))

        return fail

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            failing("fsync")()
        real(descriptor)

    for name in answers.keys() & {"chmod", "symlink", "utime"}:
        monkeypatch.setattr(os, name, failing(name))
    if "fsync" in answers:
        monkeypatch.setattr(os, "fsync", fsync)
    if "flock" in answers:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", failing("flock"))


def shim():
    """Returns the path of fs_shim's sitecustomize.py in the folder GPT_TEST_CASES; skips the test without it."""
    cases = os.environ.get("GPT_TEST_CASES")
    path = Path(cases).absolute() / "fs_shim/sitecustomize.py" if cases else None
    if path is None or not path.exists():
        pytest.skip("needs fs_shim: set GPT_TEST_CASES to a folder that holds it")
    return path


def run_on_shim(path, module, *words):
    """For a process of its own: runs `module`.main with `words` as arguments on the file system of FS_SHIM."""
    import importlib
    import sys

    runpy.run_path(str(path))
    sys.argv = [module, *words]
    importlib.import_module(module).main()
