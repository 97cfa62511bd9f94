"""Token shards: what is written, what is refused and how, foreign folders, reading by position, verification."""

import errno
import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
from training_helpers import make_data, snapshot, train_here

from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.text import shards as shards_module
from gpt.text.corpus import Corpus
from gpt.text.reader import TokenReader, Verifier, verify
from gpt.text.shards import HEADER_BYTES, ShardWriter, inside, open_dataset, write_manifest
from gpt.text.tokenizer import save_tokenizer, train_bpe

RECORD = {"name": "test", "identity": "0" * 64, "vocab_size": 50257, "eot": 50256}


def ids_of(count, below=50257, seed=0):
    return np.random.default_rng(seed).integers(0, below, count)


def write(folder, split="train", ids=None, dtype="uint16", shard_tokens=1000, pieces=1):
    """The manifest's entries of `ids` written in several pieces."""
    writer = ShardWriter(folder, split, dtype, shard_tokens)
    for piece in np.array_split(ids_of(2500) if ids is None else ids, pieces):
        writer.write(piece, documents=1, source_bytes=len(piece))
    return writer.close()


def dataset(folder, dtype="uint16", **splits):
    """A folder with a manifest; split name -> ids."""
    folder.mkdir(exist_ok=True)
    entries = {split: write(folder, split, ids, dtype) for split, ids in splits.items()}
    write_manifest(folder, RECORD, dtype, entries, {"inputs": []})
    return folder


def llm_c(path, ids, dtype="<u2", magic=20240520, version=1, tokens=None, order="<"):
    """A shard as llm.c's data scripts write it, made with struct alone."""
    count = len(ids) if tokens is None else tokens
    header = struct.pack(f"{order}3i", magic, version, count) + bytes(253 * 4)
    path.write_bytes(header + np.asarray(ids).astype(dtype).tobytes())
    return path


@pytest.fixture
def data(tmp_path):
    """A small data folder with the byte tokenizer: 3 training shards and 1 for validation."""
    return make_data(tmp_path / "data", train_size=4000, val_size=600, shard_tokens=1500)


def run_tiny(data, *flags):
    """A training run on `data` in its folder's neighbour `out`."""
    return train_here(
        "tiny", "--data", data, "--out", data.parent / "out", "--threads", "1", "--warmup_steps", "0", *flags
    )


def refused(data, *flags):
    """Code and last line of a training run that must fail and create nothing."""
    out = data.parent / "out"
    run = run_tiny(data, *flags)
    assert not out.exists()
    assert "Traceback" not in run.stderr
    return run.code, run.last


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


def test_a_shard_under_way_is_a_temporary_file(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 1000)
    writer.write(ids_of(10))
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin.tmp"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_fault_010_an_id_above_65535_does_not_fit_uint16(tmp_path):
    with pytest.raises(InputError, match="token id 100256 does not fit uint16"):
        write(tmp_path, ids=np.array([1, 100256]))


def test_fault_012_no_space_left_names_the_shard_and_removes_the_temporary_file(tmp_path):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.file.close()

    writer = ShardWriter(tmp_path, "train", "uint16", 1000)
    writer.write(ids_of(10))
    writer.file = Full(writer.file)
    with pytest.raises(ResourceError, match=r"no space left writing train_000000.bin"):
        writer.write(ids_of(10))
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


def test_fault_018_a_shard_truncated_while_it_is_read_is_an_integrity_error(tmp_path):
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids_of(2500))).splits["train"], 50257)
    reader.read(0, 2500)
    os.truncate(tmp_path / "d/train_000001.bin", HEADER_BYTES + 900)
    reader.read(0, 1400)
    with pytest.raises(IntegrityError, match=r"train_000001.bin: 1924 bytes, header says 3024 \(truncated\?\)"):
        reader.read(1400, 100)


@pytest.mark.parametrize("split", ["train", "val"])
def test_fault_019_a_flipped_byte_ends_the_run_with_3_before_a_checkpoint_is_written(data, split):
    path = data / f"{split}_000000.bin"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 800] ^= 1
    path.write_bytes(content)
    out = data.parent / "out"
    run = run_tiny(data, "--max_steps", "2", "--save_every", "1")
    assert run.code == 3
    assert f"{split}_000000.bin: sha256 mismatch" in run.last
    assert not list(out.glob("step-*"))
    run = run_tiny(data, "--max_steps", "1", "--verify", "size")
    assert run.code == 0


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


@pytest.mark.parametrize("verified", [True, False])
def test_fault_021_an_id_beyond_the_vocabulary_is_refused_naming_shard_id_and_offset(tmp_path, verified):
    ids = ids_of(2500, 50000)
    ids[1812] = 60000
    shards = open_dataset(dataset(tmp_path / "d", train=ids)).splits["train"]
    with pytest.raises(IntegrityError, match=r"train_000001.bin: token 60000 at offset 812, vocab_size 50257"):
        if verified:
            verify(shards[1], 50257)
        else:
            TokenReader(shards, 50257).read(1700, 200)


def test_fault_021_in_training_it_is_exit_3(data):
    llm_c(data / "train_000001.bin", [*ids_of(1499, 256), 60000])
    run = run_tiny(data, "--verify", "size")
    assert run.code == 3
    assert "train_000001.bin: token 60000 at offset 1499, vocab_size 257" in run.last


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


def test_fault_023_shards_of_another_tokenizer_are_refused_naming_both(data):
    other = train_bpe(["the sea was calm and a gull cried " * 20], 280)
    save_tokenizer(other, data)
    code, last = refused(data)
    assert code == 2
    assert "byte" in last
    assert other.name in last


def test_a_tokenizer_given_for_data_that_names_its_own_is_refused(data):
    code, last = refused(data, "--tokenizer", "byte")
    assert code == 2
    assert "--tokenizer" in last


def test_fault_024_a_split_shorter_than_a_window_is_refused_with_both_numbers(tmp_path):
    for split, sizes in (("val", {"val_size": 31}), ("train", {"train_size": 50})):
        folder = make_data(tmp_path / split, **sizes)
        tokens = open_dataset(folder).splits[split][0].tokens
        code, last = refused(folder, "--block_size", "64")
        assert code == 2
        assert f"{split} has {tokens} tokens; needs at least 65 (block_size+1)" in last


def test_fault_025_fewer_windows_than_the_batch_is_refused_with_both_numbers(tmp_path):
    folder = make_data(tmp_path / "data", train_size=320)  # 321 tokens: (321 - 32) // 32 = 9 windows
    code, last = refused(folder, "--global_batch_size", "10")
    assert code == 2
    assert "9 windows" in last
    assert "global_batch_size is 10" in last
    run = run_tiny(folder, "--global_batch_size", "9", "--max_steps", "1")
    assert run.code == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_fault_027_a_read_is_tried_three_times_then_exit_5_names_file_and_errno(tmp_path, monkeypatch, number):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0)
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"], 50257)
    failures, pread = [], os.pread

    def failing(left):
        def read(*args):
            if len(failures) < left:
                failures.append(args)
                raise OSError(number, os.strerror(number))
            return pread(*args)

        return read

    monkeypatch.setattr(os, "pread", failing(2))
    assert np.array_equal(reader.read(0, 900), ids_of(900))
    assert len(failures) == 2
    failures.clear()
    monkeypatch.setattr(os, "pread", failing(99))
    with pytest.raises(ResourceError, match=rf"train_000000.bin.*{os.strerror(number)} \(errno {number}\)") as caught:
        reader.read(0, 900)
    assert len(failures) == 3
    assert caught.value.code == 5


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
    with pytest.raises(IntegrityError, match=r"dataset.json: not a dataset manifest"):
        open_dataset(tmp_path)


def test_a_newer_manifest_is_refused_naming_both_versions(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(100))
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    with pytest.raises(IntegrityError, match=r"data format 9, this program reads up to 1"):
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


OTHER_ARRAYS = [np.zeros((2, 2), np.uint16), np.zeros(4, np.int64), np.zeros(4, ">u2"), np.zeros(4, np.float16)]


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
    (tmp_path / "train_000000.bin.tmp").write_bytes(b"")
    with pytest.raises(InputError, match="unfinished data preparation"):
        open_dataset(tmp_path)


def test_a_foreign_folder_trains_with_the_tokenizer_given(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    llm_c(data / "my_train_0.bin", ids_of(3000, 256))
    run = run_tiny(data, "--tokenizer", "byte", "--max_steps", "1")
    assert run.code == 0
    assert "assuming tokenizer byte" in run.stderr
    assert (out / "step-000000001").is_dir()


# ---- reading


@pytest.mark.parametrize("by_position", [True, False])
def test_reads_across_shard_borders_equal_slices_of_the_whole(tmp_path, monkeypatch, by_position):
    if not by_position:
        monkeypatch.delattr(os, "pread")  # as on Windows
    ids = ids_of(1000)
    start = 0
    for number, size in enumerate([1, 10, 389, 1, 1, 500, 98]):
        llm_c(tmp_path / f"train_{number}.bin", ids[start : start + size])
        start += size
    llm_c(tmp_path / "train_2b.bin", [])  # an empty one between
    reader = TokenReader(open_dataset(tmp_path).splits["train"], 50257)
    assert len(reader) == 1000
    draw = np.random.default_rng(1)
    spans = [(0, 1000), (0, 0), (0, 1), (10, 1), (11, 389), (999, 1), (399, 3)]
    spans += [(int(s), int(draw.integers(1, 1001 - s))) for s in draw.integers(0, 1000, 200)]
    for start, count in spans:
        read = reader.read(start, count)
        assert read.dtype == np.int64
        assert np.array_equal(read, ids[start : start + count])
    for start in range(1000):
        index, offset = reader.place(start)
        assert reader.read_shard(index, offset, 1)[0] == ids[start]


def test_a_short_answer_of_the_system_is_completed(tmp_path, monkeypatch):
    ids = ids_of(900)
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids)).splits["train"], 50257)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    assert np.array_equal(reader.read(100, 300), ids[100:400])


# ---- verification in the background


def test_the_verifier_passes_good_shards_and_reports_the_first_bad_one(tmp_path):
    shards = open_dataset(dataset(tmp_path / "d", train=ids_of(2500))).splits["train"]
    verifier = Verifier(shards, 50257)
    verifier.wait()  # not started: nothing to wait for
    verifier.start()
    verifier.wait()
    content = bytearray(shards[1].path.read_bytes())
    content[-1] ^= 1
    shards[1].path.write_bytes(content)
    verifier = Verifier(shards, 1 << 16)
    verifier.start()
    with pytest.raises(IntegrityError, match=r"train_000001.bin: sha256 mismatch"):
        verifier.wait()


def test_verification_reads_in_blocks_and_names_the_offset_in_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.text.reader.BLOCK_BYTES", 64)
    ids = ids_of(900, 50000)
    shard = open_dataset(dataset(tmp_path / "a", train=ids)).splits["train"][0]
    verify(shard, 50257)
    ids[777] = 65000
    shard = open_dataset(dataset(tmp_path / "b", train=ids)).splits["train"][0]
    with pytest.raises(IntegrityError, match="token 65000 at offset 777"):
        verify(shard, 50257)


@pytest.mark.parametrize("left", [HEADER_BYTES + 1001, HEADER_BYTES + 1000, 3])
def test_verification_of_a_shard_cut_since_it_was_opened_is_an_integrity_error(tmp_path, left):
    shard = open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"][0]
    os.truncate(shard.path, left)
    verifier = Verifier([shard], 50257)
    verifier.start()
    with pytest.raises(IntegrityError, match="truncated"):
        verifier.wait()


def test_verification_that_cannot_read_is_exit_5(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0)
    shard = open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"][0]
    shard.path.unlink()
    verifier = Verifier([shard], 50257)
    verifier.start()
    with pytest.raises(ResourceError, match=r"train_000000.bin.*No such file"):
        verifier.wait()


@pytest.mark.parametrize("error", [MemoryError("no memory"), ValueError("a bug"), OSError(errno.EMFILE, "too many")])
def test_fault_019_whatever_ends_the_verification_early_ends_the_run_too(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    shards = open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"]
    monkeypatch.setattr("gpt.text.reader.verify", fail)
    verifier = Verifier(shards, 50257)
    verifier.start()
    for check in (verifier.wait, verifier.check):
        with pytest.raises(type(error)) as caught:
            check()
        assert caught.value is error


def test_a_shard_deleted_while_it_is_verified_is_exit_5(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0)
    shard = open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"][0]
    monkeypatch.setattr("gpt.text.reader.ids_of", lambda *_: shard.path.unlink())
    with pytest.raises(ResourceError, match=r"train_000000.bin.*No such file"):
        verify(shard, 50257)


def test_the_record_for_checkpoints_names_tokens_and_hash_of_every_shard(tmp_path):
    folder = dataset(tmp_path / "d", train=ids_of(1100), val=ids_of(50))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.bin")}
    assert open_dataset(folder).record == {
        "train": [[f"train_00000{i}.bin", n, hashes[f"train_00000{i}.bin"]] for i, n in ((0, 1000), (1, 100))],
        "val": [["val_000000.bin", 50, hashes["val_000000.bin"]]],
    }


def test_fault_110_a_file_name_cannot_drive_the_terminal(data, capsys):
    llm_c(data / "x\x1b[2J.bin", [1])
    Corpus(data, "", "size", 32, 1, 1).close()
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said
    assert "\x1b" not in said
