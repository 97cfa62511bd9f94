"""Reading shards by position as one stream of ids, and their verification in the background."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from shard_helpers import dataset, ids_of, llm_c, run_tiny
from training_helpers import make_data

from gpt.errors import IntegrityError, ResourceError
from gpt.text import shards as shards_module
from gpt.text.reader import TokenReader, Verifier, read_ids, verify
from gpt.text.shards import HEADER_BYTES, open_dataset


@pytest.fixture
def data(tmp_path):
    """A small data folder with the byte tokenizer: 3 training shards and 1 for validation."""
    return make_data(tmp_path / "data", train_size=4000, val_size=600, shard_tokens=1500)


# ---- reading


def test_reads_across_shard_borders_equal_slices_of_the_whole(tmp_path):
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
        assert read_ids(reader.files[index], reader.shards[index], offset, 1, 50257)[1] == ids[start]


class Unreliable:
    """Stands in for a file: gives at most `most` bytes at a time, and fails `failures` times."""

    def __init__(self, file, most=1 << 30, failures=0, number=0):
        self.file, self.most, self.failures, self.number = file, most, failures, number

    def seek(self, offset):
        self.file.seek(offset)

    def read(self, size):
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.file.read(min(size, self.most))


def test_a_short_answer_of_the_system_is_completed(tmp_path):
    ids = ids_of(900)
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids)).splits["train"], 50257)
    reader.files[0].file = Unreliable(reader.files[0].file, most=7)
    assert np.array_equal(reader.read(100, 300), ids[100:400])


def test_several_threads_read_one_file_side_by_side(tmp_path):
    ids = ids_of(9000)
    shards = open_dataset(dataset(tmp_path / "d", train=ids)).splits["train"]
    reader = TokenReader(shards, 50257)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: reader.read(start, 30), range(0, 9000, 30)))
    assert np.array_equal(np.concatenate(parts), ids)


def test_fault_018_a_shard_truncated_while_it_is_read_is_an_integrity_error(tmp_path):
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids_of(2500))).splits["train"], 50257)
    reader.read(0, 2500)
    os.truncate(tmp_path / "d/train_000001.bin", HEADER_BYTES + 900)
    reader.read(0, 1400)
    with pytest.raises(IntegrityError, match=r"train_000001.bin: 1924 bytes, header says 3024 \(truncated\?\)"):
        reader.read(1400, 100)


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


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_fault_027_a_read_is_tried_three_times_then_exit_5_names_file_and_errno(tmp_path, monkeypatch, number):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0)
    reader = TokenReader(open_dataset(dataset(tmp_path / "d", train=ids_of(900))).splits["train"], 50257)
    file = reader.files[0].file
    reader.files[0].file = Unreliable(file, failures=2, number=number)
    assert np.array_equal(reader.read(0, 900), ids_of(900))
    reader.files[0].file = Unreliable(file, failures=3, number=number)
    with pytest.raises(ResourceError, match=rf"train_000000.bin.*{os.strerror(number)} \(errno {number}\)") as caught:
        reader.read(0, 900)
    assert caught.value.code == 5


# ---- verification in the background


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
    monkeypatch.setattr("gpt.text.reader.read_ids", lambda *_: (b"", shard.path.unlink()))
    with pytest.raises(ResourceError, match=r"train_000000.bin.*No such file"):
        verify(shard, 50257)
