"""Fixtures for tests of texts."""

import errno
import io
import os

import pytest


@pytest.fixture
def full_disk(monkeypatch):
    """Makes every write to a new temporary file fail."""

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
