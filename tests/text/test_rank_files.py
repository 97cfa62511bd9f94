"""tiktoken's own files: from the cache or the network, never damaged, never without limit."""

import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest
import tiktoken.load
from conftest import ROOT

from gpt.errors import InputError, IntegrityError
from gpt.text.tokenizer import load_tokenizer

GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")  # merges, vocab


@pytest.fixture
def no_network(monkeypatch):
    """Name look-ups fail, and tiktoken has loaded nothing yet."""

    def fail(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})


def test_fault_008_a_damaged_tokenizer_file_is_never_used_nor_deleted(bpe_cache, tmp_path, monkeypatch, no_network):
    name = GPT2_FILES[0]
    data = (bpe_cache / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-10])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    expected = hashlib.sha256(data).hexdigest()
    with pytest.raises(
        IntegrityError, match=rf"{name}: sha256 mismatch \(expected {expected}\); restore it or go online"
    ):
        load_tokenizer("gpt2")
    assert (tmp_path / name).read_bytes() == data[:-10]


def test_fault_009_no_cache_and_no_network_names_the_file_and_its_place(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    original = tiktoken.load.read_file_cached
    with pytest.raises(InputError) as failure:
        load_tokenizer("gpt2")
    assert "vocab.bpe" in str(failure.value)
    assert str(tmp_path / GPT2_FILES[0]) in str(failure.value)
    assert tiktoken.load.read_file_cached is original


def test_named_encodings_need_nothing_imported_before():
    code = "from gpt.text.rank_files import own_cache\nwith own_cache('gpt2'): pass"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_name_look_up_that_hangs_is_given_up(tmp_path, monkeypatch, no_network):
    released = threading.Event()

    def hang(*_args, **_kwargs):
        released.wait(60)
        raise OSError

    monkeypatch.setattr("gpt.text.download.CONNECT_SECONDS", 0.1)
    monkeypatch.setattr("socket.getaddrinfo", hang)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="no answer in"):
        load_tokenizer("gpt2")
    released.set()


@pytest.fixture
def downloads(bpe_cache, monkeypatch, no_network):
    """Name -> bytes of gpt2's files, which the network delivers meanwhile."""
    files = {name: (bpe_cache / name).read_bytes() for name in GPT2_FILES}

    def answer(url, file, sha256, limit):
        file.write(files[hashlib.sha1(url.encode()).hexdigest()])

    monkeypatch.setattr("gpt.text.rank_files.download", answer)
    return files


def test_a_downloaded_file_is_kept_for_the_next_time(downloads, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == downloads


def test_downloads_are_kept_in_the_programs_cache_folder_which_stays_private(downloads, tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mask = os.umask(0o002)  # the default of many systems: others of the same group may write
    try:
        load_tokenizer("gpt2")
    finally:
        os.umask(mask)
    folder = tmp_path / "gpt-text-generator"
    assert {path.name: path.read_bytes() for path in (folder / "tiktoken").iterdir()} == downloads
    assert os.name == "nt" or stat.S_IMODE(folder.stat().st_mode) == 0o700  # else no C++ would be built there
