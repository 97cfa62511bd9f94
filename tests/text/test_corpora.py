"""The built-in corpora."""

import ast
import email
import json
from pathlib import Path

import pytest
from prepare_helpers import documents_of, prepare_here, write

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text.corpora import SHAKESPEARE_BYTES, docstrings, shakespeare, standard_library
from gpt.text.reader import TokenReader, read_masks
from gpt.text.shards import FIRST, TARGET, open_dataset
from gpt.text.sources import Reading, read_pieces


def test_the_standard_library_is_read_as_python_reads_it_without_tests(tmp_path):
    lib = tmp_path / "lib"
    for name in (
        "a.py",
        "test/t.py",
        "pkg/tests/t.py",
        "site-packages/s.py",
        "pkg/b.py",
        "pkg/__pycache__/c.py",
        "bad.py",
    ):
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        write(lib / name, f"# {name}\n")
    write(lib / "latin.py", "# -*- coding: latin-1 -*-\n# é\n", encoding="latin-1")
    write(lib / "bad.py", b"# \xff\n")
    sources, origin = standard_library(lib)
    pieces = list(read_pieces(sources, Reading()))
    assert [piece.text for piece in pieces if piece.readable and piece.text] == [
        "# a.py\n",
        "# -*- coding: latin-1 -*-\n# é\n",
        "# pkg/b.py\n",
    ]
    assert [piece.name for piece in pieces if not piece.readable] == [str(lib / "bad.py")]
    assert origin["files"] == 4 and len(origin["sha256_of_names_and_sizes"]) == 64


def test_a_file_that_python_cannot_decode_is_dropped_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    texts = [f"# file number {n}\n" for n in range(300)]
    for n, text in enumerate(texts):
        write(tmp_path / f"lib/{n:03d}.py", b"\xff" if n % 100 == 50 else text)
    monkeypatch.setattr("sysconfig.get_path", lambda _: tmp_path / "lib")
    manifest = prepare_here(tmp_path / "out", corpus="stdlib", val_fraction=0.2)
    documents = documents_of(tmp_path / "out") + documents_of(tmp_path / "out", "val")
    assert sorted(documents) == sorted(text for n, text in enumerate(texts) if n % 100 != 50)
    assert (manifest["source"]["split"]["rule"], manifest["source"]["undecodable"]) == ("hash", 3)


def test_this_interpreters_standard_library_has_its_modules_and_no_tests():
    sources, origin = standard_library()
    names = {source.path.name for source in sources}
    assert {"argparse.py", "dataclasses.py"} <= names and "test_argparse.py" not in names
    assert origin["files"] == len(sources) > 400


FUNCTIONS = '''
class A:
    @property
    def name(self):
        """Return the
        name.

        More.
        """
        # a comment
        return self._name

def bare(): """Only a docstring."""
def none(): return 1
def long():
    """Too long."""
    return NUMBERS
'''.replace("NUMBERS", str([*range(100)]))


def test_docstrings_are_the_prompts_of_their_short_functions(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    write(tmp_path / "lib/a.py", FUNCTIONS)
    write(tmp_path / "lib/b.py", "def broken(:\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: tmp_path / "lib")
    manifest = prepare_here(tmp_path / "out", corpus="docstrings", val_fraction=0)
    shards = open_dataset(tmp_path / "out").splits["train"]
    *ids, end = TokenReader(shards, 257).read(0, shards[0].tokens).tolist()
    prompt, completion = b'"""Return the name."""\n', b"def name(self):\n    return self._name\n"
    assert (bytes(ids), end) == (prompt + completion, 256)
    assert read_masks(shards).tolist() == [FIRST] + [0] * (len(prompt) - 1) + [TARGET] * (len(completion) + 1)
    assert manifest["source"]["corpus"] == "docstrings"


def test_real_functions_are_python_that_begins_with_def(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda _: Path(email.__file__).parent)  # a part of the library
    [source], _ = docstrings(tmp_path)
    examples = [json.loads(line) for line in source.spool]
    assert len(examples) > 50
    for example in examples:
        [function] = ast.parse(example["completion"]).body
        assert isinstance(function, ast.FunctionDef) and example["completion"].startswith("def ")


def test_shakespeare_is_downloaded_checked_and_prepared(tmp_path, server, tinyshakespeare):
    url, files = server
    files["/input.txt"] = tinyshakespeare.read_bytes()
    manifest = prepare_here(tmp_path / "out", corpus="shakespeare", url=f"{url}/input.txt", val_fraction=0)
    assert documents_of(tmp_path / "out") == [tinyshakespeare.read_text(encoding="utf-8")]
    assert manifest["source"]["corpus"] == "shakespeare"


def test_a_download_that_is_not_shakespeare_is_refused(tmp_path, server):
    url, files = server
    files["/short.txt"], files["/long.txt"] = b"short", bytes(SHAKESPEARE_BYTES + 1)
    for path, failure, message in (
        ("/short.txt", IntegrityError, "sha256 mismatch"),
        ("/long.txt", IntegrityError, "more than the 1115394 bytes"),
        ("/absent.txt", ResourceError, f"download failed: {url}/absent.txt"),
    ):
        with pytest.raises(failure, match=message):
            prepare_here(tmp_path / "out", corpus="shakespeare", url=url + path)
    with pytest.raises(InputError, match="not an https address"):
        shakespeare("http://example.com/input.txt", tmp_path)
    assert not (tmp_path / "out").exists()


def test_fault_012_a_full_disk_under_the_download_is_exit_5(tmp_path, server, full_disk):
    url, files = server
    files["/input.txt"] = b"text"
    with pytest.raises(ResourceError, match=r"storing the download failed: .*: No space left on device; free some"):
        shakespeare(f"{url}/input.txt", tmp_path)
