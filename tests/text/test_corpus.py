"""The data of a run: tokenizers that must agree, too little text, shards made by other programs."""

import pytest
from shard_helpers import ids_of, llm_c, refused, run_tiny
from training_helpers import make_data

from gpt.text.corpus import Corpus
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import save_tokenizer, train_bpe


@pytest.fixture
def data(tmp_path):
    """A small data folder with the byte tokenizer: 3 training shards and 1 for validation."""
    return make_data(tmp_path / "data", train_size=4000, val_size=600, shard_tokens=1500)


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


def test_a_foreign_folder_trains_with_the_tokenizer_given(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    llm_c(data / "my_train_0.bin", ids_of(3000, 256))
    run = run_tiny(data, "--tokenizer", "byte", "--max_steps", "1")
    assert run.code == 0
    assert "assuming tokenizer byte" in run.stderr
    assert (out / "step-000000001").is_dir()


def test_fault_110_a_file_name_cannot_drive_the_terminal(data, capsys):
    llm_c(data / "x\x1b[2J.bin", [1])
    Corpus(open_dataset(data), "", "size", 32, 1, 1).close()
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said
    assert "\x1b" not in said
