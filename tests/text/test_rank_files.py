"""tiktoken's own files: from the cache or the network, never damaged, never without limit; and a user's rank files."""

import hashlib
import os
import stat
import threading

import pytest
import tiktoken.registry
from tokenizer_helpers import GPT2_FILES, byte_ranks, write_rank_file

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.rank_files import HOST, RANK_FILES
from gpt.text.tokenizer import load_tokenizer

# ---- tiktoken's files


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
    with pytest.raises(InputError) as failure:
        load_tokenizer("gpt2")
    assert "vocab.bpe" in str(failure.value)
    assert str(tmp_path / GPT2_FILES[0]) in str(failure.value)


@pytest.mark.parametrize("name", RANK_FILES)
def test_the_table_names_the_files_that_tiktoken_reads(monkeypatch, name):
    """tiktoken's own download has no time limit (fault 9), so every file must be in its cache before it looks."""
    files = {}

    def read_file_cached(url, expected_hash):
        files[url.removeprefix(HOST)] = expected_hash
        raise EOFError

    monkeypatch.setattr("tiktoken.load.read_file_cached", read_file_cached)
    tiktoken.list_encoding_names()  # finds the constructors
    with pytest.raises(EOFError):
        tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    assert files.items() <= RANK_FILES[name].items()
    assert set(RANK_FILES) == set(tiktoken.list_encoding_names())


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

    monkeypatch.setattr("gpt.text.download.fetch", answer)
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
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert os.name == "nt" or stat.S_IMODE(folder.stat().st_mode) == 0o700  # else no C++ would be built there


def test_a_cached_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, no_network):
    (tmp_path / GPT2_FILES[0]).mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ResourceError, match=f"{GPT2_FILES[0]}: Is a directory; make it readable"):
        load_tokenizer("gpt2")


def test_fault_008_a_damaged_file_in_a_cache_that_cannot_be_written_is_not_used(downloads, tmp_path, monkeypatch):
    for name in GPT2_FILES:
        (tmp_path / name).write_bytes(b"damaged")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("os.replace", refuse)
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GPT2_FILES)


def test_a_cache_that_cannot_be_written_is_a_warning(downloads, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]
    assert capsys.readouterr().err.startswith(f"warning: {cache}: cannot be written; ")
    assert os.environ["TIKTOKEN_CACHE_DIR"] == cache


@pytest.mark.parametrize("home", [True, False])
def test_without_a_cache_folder_nothing_is_kept(downloads, tmp_path, monkeypatch, capsys, home):
    """Either the variable is empty, which is tiktoken's way to say so, or the user has no home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    if not home:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
        monkeypatch.setattr("gpt.text.rank_files.cache_folder", lambda: None)
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]
    assert (list(tmp_path.iterdir()), capsys.readouterr().err) == ([], "")
    monkeypatch.setattr("gpt.text.download.fetch", unreachable)
    with pytest.raises(InputError, match="to a folder named by TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


def unreachable(*_):
    raise ResourceError("download failed")


def test_what_only_a_newer_tiktoken_knows_is_left_to_it(monkeypatch, no_network, tmp_path):
    def constructor():
        raise OSError("the network is down")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "new", constructor)
    with pytest.raises(InputError, match="tokenizer new: the network is down; go online"):
        load_tokenizer("new")


# ---- a user's files


def test_rank_files_with_mistakes_are_refused(tmp_path):
    for ranks, changes, message in (
        (byte_ranks() | {b"ab": 5}, {}, "two tokens"),
        (byte_ranks() | {b"ab": 1 << 40}, {}, "whole number"),
        (byte_ranks(), {"pattern": "("}, "pattern"),
        (byte_ranks(), {"special_tokens": {}}, "no special token"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(write_rank_file(tmp_path, ranks, **changes))
    (tmp_path / "x.tiktoken").write_text("YQ== 1\n???\n")
    with pytest.raises(InputError, match="tiktoken:2"):
        load_tokenizer(tmp_path / "x.tiktoken")
    (tmp_path / "x.json").unlink()
    with pytest.raises(InputError, match=r"x\.json"):
        load_tokenizer(tmp_path / "x.tiktoken")


def test_a_rank_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write_rank_file(tmp_path, byte_ranks())

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gpt.files.open", refuse, raising=False)
    with pytest.raises(ResourceError, match=r"x\.tiktoken: Permission denied; make it readable"):
        load_tokenizer(path)
