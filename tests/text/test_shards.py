"""Token shards: what is written, what is refused and how, foreign folders."""

import errno
import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
from shard_helpers import RECORD, dataset, ids_of, llm_c, refused, run_tiny, write
from training_helpers import make_data, make_examples, random_examples, snapshot, train_here

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import inside
from gpt.text import shards as shards_module
from gpt.text.reader import TokenReader, read_masks, verify
from gpt.text.shards import HEADER_BYTES, ShardWriter, open_dataset, write_manifest

OTHER_ARRAYS = [np.zeros((2, 2), np.uint16), np.zeros(4, np.int64), np.zeros(4, ">u2"), np.zeros(4, np.float16)]


@pytest.fixture
def data(tmp_path):
    """A small data folder with the byte tokenizer: 3 training shards and 1 for validation."""
    return make_data(tmp_path / "data", train_size=4000, val_size=600, shard_tokens=1500)


# ---- writing


@pytest.mark.parametrize("pieces", [1, 2, 7, 500])
def test_shards_read_back_as_written_however_the_ids_came(tmp_path, pieces):
    ids = ids_of(2500)
    entries = write(tmp_path, ids=ids, pieces=pieces)
    assert [e["name"] for e in entries] == [f"train_{i:06d}.bin" for i in range(3)]
    assert [e["tokens"] for e in entries] == [1000, 1000, 500]
    assert sum(e["documents"] for e in entries) == pieces
    assert sum(e["source_bytes"] for e in entries) == 2500
    write_manifest(tmp_path, RECORD, "uint16", {"train": entries}, {})
    reader = TokenReader(open_dataset(tmp_path).splits["train"], 50257)
    assert np.array_equal(reader.read(0, 2500), ids)


@pytest.mark.parametrize(
    ("dtype", "code", "magic", "version"), [("uint16", "H", 20240520, 1), ("uint32", "I", 20240801, 7)]
)
def test_the_bytes_are_those_of_llm_c(tmp_path, dtype, code, magic, version):
    ids = ids_of(100, np.iinfo(dtype).max)
    write(tmp_path, ids=ids, dtype=dtype)
    content = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack_from("<256i", content) == (magic, version, 100, *[0] * 253)
    assert struct.unpack(f"<100{code}", content[1024:]) == tuple(ids)


def test_an_entry_holds_the_sha256_of_its_file(tmp_path):
    for entry in write(tmp_path):
        assert entry["sha256"] == hashlib.sha256((tmp_path / entry["name"]).read_bytes()).hexdigest()


def test_a_shard_that_is_exactly_full_leaves_no_empty_one_behind(tmp_path):
    assert [e["tokens"] for e in write(tmp_path, ids=ids_of(2000))] == [1000, 1000]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train_000000.bin", "train_000001.bin"]


def test_an_unfinished_shard_is_removed_when_it_is_discarded(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 1000)
    writer.write(ids_of(10))
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_masks_of_examples_read_back_as_written(tmp_path):
    examples = random_examples(40)
    folder = make_examples(tmp_path, examples, examples[:3], shard_tokens=100)
    opened = open_dataset(folder)
    assert opened.has_examples and len(opened.splits["train"]) > 5
    masks = read_masks(opened.splits["train"])
    expected = [[2] + [0] * (len(ids) - learned - 1) + [1] * learned for ids, learned in examples]
    assert masks.tolist() == [bits for example in expected for bits in example]
    for shard in opened.splits["train"]:
        content = shard.path.with_suffix(".mask").read_bytes()
        assert shard.mask_sha256 == hashlib.sha256(content).hexdigest() and len(content) == shard.tokens
    recorded = {name: digest for name, _, digest in opened.shard_list["train"]}
    assert recorded["train_000003.mask"] == opened.splits["train"][3].mask_sha256
    assert not open_dataset(dataset(tmp_path / "plain", train=ids_of(9))).has_examples


def test_an_unfinished_mask_is_removed_when_it_is_discarded(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 1000, masks=True)
    writer.write(np.arange(3), mask=np.array([2, 0, 1], dtype=np.uint8))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), r"train_000000\.mask: missing"),
        (lambda path: os.truncate(path, 5), r"train_000000\.mask: 5 bytes, needs .* \(truncated\?\)"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"train_000000\.mask: .* \(too long\?\)"),
        (lambda path: path.write_bytes(bytes([3]) + path.read_bytes()[1:]), r"train_000000\.mask: sha256 mismatch"),
    ],
)
def test_fault_017_a_damaged_mask_is_refused(tmp_path, damage, said):
    folder = make_examples(tmp_path, random_examples(20))
    damage(folder / "train_000000.mask")
    with pytest.raises(IntegrityError, match=said):
        verify(open_dataset(folder).splits["train"][0], 257)


def test_a_mask_with_other_bits_is_refused(tmp_path):
    folder = make_examples(tmp_path, random_examples(20))
    path = folder / "train_000000.mask"
    path.write_bytes(path.read_bytes()[:-1] + b"\4")
    with pytest.raises(IntegrityError, match=r"train_000000\.mask: not a mask"):
        read_masks(open_dataset(folder).splits["train"])


def test_older_programs_refuse_data_with_masks_and_read_those_without(tmp_path):
    """They would learn the prompts too."""
    for folder, version in ((make_examples(tmp_path / "a", random_examples(9)), 2), (make_data(tmp_path / "b"), 1)):
        assert json.loads((folder / "dataset.json").read_text())["format_version"] == version


def test_masks_for_some_shards_alone_are_refused(tmp_path):
    folder = make_examples(tmp_path, random_examples(40), shard_tokens=100)
    manifest = json.loads((folder / "dataset.json").read_text())
    del manifest["splits"]["train"][1]["mask_sha256"]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="some shards have masks and some have none"):
        open_dataset(folder)


def test_fault_010_an_id_above_65535_does_not_fit_uint16(tmp_path):
    with pytest.raises(InputError, match="token id 100256 does not fit uint16"):
        write(tmp_path, ids=np.array([1, 100256]))


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_fault_012_no_space_left_names_the_shard_which_can_be_discarded(tmp_path, failing):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            if name in (failing, "close"):
                self.file.close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return getattr(self.file, name)

    writer = ShardWriter(tmp_path, "train", "uint16", 1000)
    writer.write(ids_of(10))
    writer.file = Full(writer.file)
    with pytest.raises(ResourceError, match=r"no space left writing train_000000.bin"):
        writer.write(ids_of(990))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


# ---- damage


@pytest.mark.parametrize("cut", [1, 500, "header", "all"])
def test_fault_017_a_cut_shard_is_refused_before_anything_is_created(data, cut):
    path = data / "train_000001.bin"
    size = path.stat().st_size
    left = {"header": 1000, "all": 0}.get(cut) if isinstance(cut, str) else size - cut
    os.truncate(path, left)
    code, last = refused(data)
    assert code == 3
    assert "train_000001.bin" in last
    assert f"{left} bytes" in last
    assert "truncated" in last
    assert str(size if left > HEADER_BYTES else HEADER_BYTES) in last


def test_fault_017_a_shard_that_is_too_long_is_refused(data):
    with open(data / "train_000001.bin", "ab") as file:
        file.write(b"\0\0")
    code, last = refused(data)
    assert (code, "too long" in last) == (3, True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"magic": 20240521}, f"not a token shard (magic 0x{20240521:08x})"),
        ({"magic": -1}, "not a token shard (magic 0xffffffff)"),
        ({"order": ">"}, f"not a token shard (magic 0x{struct.pack('<i', 20240520).hex()})"),
        ({"version": 2}, "version 2"),
        ({"tokens": -5}, "-5 tokens"),
        ({"tokens": 1501}, "truncated"),
    ],
)
def test_fault_020_a_wrong_header_is_refused(data, damage, said):
    llm_c(data / "train_000001.bin", ids_of(1500, 256), **damage)
    code, last = refused(data)
    assert code == 3
    assert "train_000001.bin" in last
    assert said in last


def test_fault_022_an_absent_shard_is_refused_by_name(data):
    (data / "train_000002.bin").unlink()
    code, last = refused(data)
    assert code == 3
    assert "train_000002.bin" in last


def test_fault_022_a_file_that_the_manifest_lacks_is_a_warning_and_not_read(data):
    llm_c(data / "train_000009.bin", ids_of(100))
    opened = open_dataset(data)
    assert opened.notice.startswith("warning: ")
    assert "train_000009.bin" in opened.notice
    assert [s.path.name for s in opened.splits["train"]] == [f"train_{i:06d}.bin" for i in range(3)]


def test_fault_027_a_shard_that_cannot_be_opened_is_exit_5(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0)
    folder = dataset(tmp_path / "d", train=ids_of(900))

    def no_opening(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(shards_module, "open", no_opening, raising=False)
    with pytest.raises(ResourceError, match=r"train_000000.bin.*Permission denied \(errno 13\)"):
        open_dataset(folder)


def test_fault_027_training_writes_nothing_into_the_data_folder(data):
    before = snapshot(data)
    for path in [*data.iterdir(), data]:
        path.chmod(path.stat().st_mode & ~0o222)
    run = run_tiny(data, "--max_steps", "1")
    data.chmod(0o755)
    assert run.code == 0
    assert snapshot(data) == before


# ---- manifests


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        "\x00",
        '{"format_version": "1"}',
        '{"format_version": 1, "tokenizer": 3, "dtype": "uint16", "splits": {}}',
        '{"format_version": 1, "tokenizer": {"name": "x", "identity": ""}, "dtype": "uint16", "splits": {}}',
        '{"format_version": 1, "tokenizer": {"name": "x", "identity": ""}, "dtype": "uint16", "splits": {"train": []}}',
        '{"format_version": 1, "tokenizer": {"name": "x"}, "dtype": "uint16", "splits": {"train": [1]}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"dataset.json: not (a dataset manifest|valid JSON|a JSON object)"):
        open_dataset(tmp_path)


def test_a_newer_manifest_is_refused_naming_both_versions(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(100))
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    with pytest.raises(IntegrityError, match=r"data format 9, this program reads up to 2"):
        open_dataset(folder)


@pytest.mark.parametrize("change", [{"tokens": 99}, {"dtype": "uint32"}])
def test_a_manifest_that_disagrees_with_its_shard_is_refused(tmp_path, change):
    folder = dataset(tmp_path / "d", train=ids_of(100))
    path = folder / "dataset.json"
    manifest = json.loads(path.read_text())
    (manifest if "dtype" in change else manifest["splits"]["train"][0]).update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"train_000000.bin: 100 uint16 tokens, the manifest says"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.bin", "a/../../x", "a\\b", "x\x00", "", ".", "C:x", 7, None])
def test_fault_108_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(IntegrityError, match="leaves its directory"):
        inside(tmp_path, name)


def test_fault_108_in_a_manifest_it_is_an_integrity_error(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(100))
    shutil.move(folder / "train_000000.bin", tmp_path / "train_000000.bin")
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"train_000000.bin"', '"../train_000000.bin"'))
    with pytest.raises(IntegrityError, match="leaves its directory"):
        open_dataset(folder)


def test_the_record_for_checkpoints_names_tokens_and_hash_of_every_shard(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(1100), val=ids_of(50))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}
    assert open_dataset(folder).shard_list == {
        "train": [[f"train_00000{i}.bin", n, hashes[f"train_00000{i}.bin"]] for i, n in ((0, 1000), (1, 100))],
        "val": [["val_000000.bin", 50, hashes["val_000000.bin"]]],
    }


# ---- foreign folders


def test_the_public_fineweb_shards_are_read_in_the_order_of_their_names(tmp_path):
    ids = ids_of(600)
    for place, number in enumerate([1, 2, 10]):
        llm_c(tmp_path / f"fineweb_train_{number:06d}.bin", ids[place * 200 : place * 200 + 200])
    llm_c(tmp_path / "fineweb_val_000000.bin", ids[:50])
    opened = open_dataset(tmp_path)
    assert opened.tokenizer is None
    assert "tokenizer gpt2" in opened.notice
    assert np.array_equal(TokenReader(opened.splits["train"], 50257).read(0, 600), ids)
    assert np.array_equal(TokenReader(opened.splits["val"], 50257).read(0, 50), ids[:50])


def test_a_training_file_with_val_in_its_name_is_no_validation_file(tmp_path):
    llm_c(tmp_path / "medieval_train_000.bin", ids_of(100))
    assert [shard.path.name for shard in open_dataset(tmp_path).splits["train"]] == ["medieval_train_000.bin"]
    assert open_dataset(tmp_path).splits["val"] == ()
    llm_c(tmp_path / "medieval_val_000.bin", ids_of(60))
    opened = open_dataset(tmp_path)
    assert [[s.path.name for s in opened.splits[split]] for split in ("train", "val")] == [
        ["medieval_train_000.bin"],
        ["medieval_val_000.bin"],
    ]


def test_nanogpts_headerless_files_are_read_once_the_tokenizer_is_named(tmp_path):
    ids = ids_of(700)
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    ids[:80].astype(np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(InputError, match="give --tokenizer"):
        open_dataset(tmp_path)
    opened = open_dataset(tmp_path, "gpt2")
    assert np.array_equal(TokenReader(opened.splits["train"], 50257).read(0, 700), ids)
    assert len(TokenReader(opened.splits["val"], 50257)) == 80
    os.truncate(tmp_path / "val.bin", 159)
    with pytest.raises(IntegrityError, match=r"val.bin: 159 bytes"):
        open_dataset(tmp_path, "gpt2")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_build_nanogpts_npy_files_are_read(tmp_path, version):
    ids = ids_of(300).astype(np.uint16)
    for name, part in (("edufineweb_train_000001.npy", ids), ("edufineweb_val_000000.npy", ids[:40])):
        with open(tmp_path / name, "wb") as file:
            np.lib.format.write_array(file, part, version=version)
    opened = open_dataset(tmp_path, "gpt2")
    assert np.array_equal(TokenReader(opened.splits["train"], 50257).read(0, 300), ids)


def test_fault_103_a_pickled_npy_is_refused_without_being_run(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    np.save(tmp_path / "train.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match=r"train.npy"):
        open_dataset(tmp_path, "gpt2")
    assert not canary.exists()


@pytest.mark.parametrize("array", OTHER_ARRAYS)
def test_a_npy_of_another_kind_is_refused(tmp_path, array):
    np.save(tmp_path / "train.npy", array)
    with pytest.raises(IntegrityError, match="needs one dimension of uint16"):
        open_dataset(tmp_path, "gpt2")


@pytest.mark.parametrize("left", [0, 5, 60, 138])
def test_a_cut_npy_is_refused(tmp_path, left):
    np.save(tmp_path / "train.npy", np.zeros(10, np.uint16))
    os.truncate(tmp_path / "train.npy", left)
    with pytest.raises(IntegrityError, match=r"train.npy"):
        open_dataset(tmp_path, "gpt2")


def test_foreign_uint32_shards_need_a_named_tokenizer(tmp_path):
    llm_c(tmp_path / "x_train_0.bin", ids_of(100, 90000), "<u4", 20240801, 7)
    with pytest.raises(InputError, match="give --tokenizer"):
        open_dataset(tmp_path)
    reader = TokenReader(open_dataset(tmp_path, "cl100k_base").splits["train"], 100277)
    assert np.array_equal(reader.read(0, 100), ids_of(100, 90000))


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300, "\x00"])
def test_fault_111_a_name_that_no_folder_can_have_is_exit_2(tmp_path, name):
    run = train_here("tiny", "--data", name, "--out", tmp_path / "out")
    assert run.code == 2
    assert "no such data folder" in run.last
    assert not (tmp_path / "out").exists()


def test_a_folder_without_shards_is_refused_saying_why(tmp_path):
    with pytest.raises(InputError, match="no such data folder"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(InputError, match=r"needs dataset.json"):
        open_dataset(tmp_path)


def test_fault_011_what_is_left_where_publishing_was_killed_is_no_foreign_folder(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(900))
    (folder / "prepare.tmp").mkdir()
    (folder / "dataset.json").rename(folder / "prepare.tmp" / "dataset.json")
    with pytest.raises(InputError, match="unfinished data preparation"):
        open_dataset(folder, "gpt2")
