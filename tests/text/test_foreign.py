"""Folders that lead to a model are followed, and said so; what is no GPT-2 is named, with the command that helps."""

import json
import os

import pytest
import torch
from checkpoint_helpers import assert_same_outputs, change_weights, theirs_of
from foreign_helpers import write

from gpt.checkpoint.read import find_model_folder, load_pretrained
from gpt.errors import InputError
from gpt.text.foreign import kind_of_weights, models_within
from gpt.text.tokenizer import load_tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("byte")


def refusal(path):
    """Returns the line that refuses to load the model at `path`."""
    with pytest.raises(InputError) as caught:
        load_pretrained(path)
    return str(caught.value)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def trainer_folder(byte, folder):
    """Writes what a Trainer leaves: numbered checkpoints, the newest last by number alone. Returns the newest model."""
    made = {step: theirs_of(byte, folder / f"checkpoint-{step}", seed=step) for step in (900, 1500, 95)}
    (folder / "runs").mkdir()
    return made[1500]


def test_a_trainers_folder_gives_its_newest_checkpoint_and_says_so(byte, tmp_path, capsys):
    newest = trainer_folder(byte, tmp_path)
    assert_same_outputs(load_pretrained(tmp_path)[0], newest, 257)
    assert f"{tmp_path}: a Trainer's output folder; taking checkpoint-1500" in capsys.readouterr().err
    assert find_model_folder(tmp_path) == tmp_path / "checkpoint-1500"
    assert load_tokenizer(tmp_path).identity == byte.identity


def test_a_trainers_newest_checkpoint_that_is_damaged_gives_the_one_before_it_with_a_warning(byte, tmp_path, capsys):
    trainer_folder(byte, tmp_path)
    (tmp_path / "checkpoint-1500/model.safetensors").write_bytes(b"cut")
    expected = load_pretrained(tmp_path / "checkpoint-900")[0]
    assert torch.equal(load_pretrained(tmp_path)[0].token.weight, expected.token.weight)
    assert "not a safetensors file; trying checkpoint-900" in capsys.readouterr().err.replace("\n", " ")


def test_a_model_saved_at_the_top_of_a_trainers_folder_is_the_result(byte, tmp_path):
    trainer_folder(byte, tmp_path)
    final = theirs_of(byte, tmp_path, seed=7)
    assert_same_outputs(load_pretrained(tmp_path)[0], final, 257)
    assert models_within(tmp_path) == []


def test_a_tokenizer_above_a_trainers_checkpoints_is_theirs(byte, tmp_path):
    trainer_folder(byte, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "checkpoint-1500" / name).rename(tmp_path / name)
    for path in (tmp_path, tmp_path / "checkpoint-1500"):
        assert load_pretrained(path)[1].identity == byte.identity
    assert load_tokenizer(tmp_path).identity == byte.identity


def hub_cache(byte, folder, commits):
    """Writes a model of the hub's cache as huggingface_hub lays it out, each snapshot a folder of links."""
    for seed, commit in enumerate(commits):
        theirs_of(byte, folder / f"blobs-{commit}", seed=seed)
        (folder / "snapshots" / commit).mkdir(parents=True)
        for path in (folder / f"blobs-{commit}").iterdir():
            (folder / "snapshots" / commit / path.name).symlink_to(path)
        os.utime(folder / "snapshots" / commit, (seed, seed))


@pytest.mark.parametrize(
    ("ref", "taken"), [("aaa", "aaa"), ("bbb\n", "bbb"), (None, "bbb"), ("../../x", "bbb"), ("gone", "bbb")]
)
def test_a_folder_of_the_hubs_cache_gives_the_snapshot_that_its_ref_names_else_the_newest(
    ref, taken, byte, tmp_path, capsys
):
    folder = tmp_path / "models--org--tiny"
    hub_cache(byte, folder, ["aaa", "bbb"])
    if ref:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(ref)
    assert find_model_folder(folder) == folder / "snapshots" / taken
    assert f"the hub's cache; taking snapshots/{taken}" in capsys.readouterr().err
    expected = load_pretrained(folder / f"blobs-{taken}")[0]
    assert torch.equal(load_pretrained(folder)[0].token.weight, expected.token.weight)
    assert load_tokenizer(folder).identity == byte.identity


def test_an_empty_folder_of_the_hubs_cache_holds_no_checkpoint(tmp_path):
    (tmp_path / "models--gpt2/snapshots").mkdir(parents=True)
    assert "no checkpoint here" in refusal(tmp_path / "models--gpt2")


def test_an_adapter_without_a_tokenizer_names_that_of_its_base(tmp_path):
    write(tmp_path, adapter_config={"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    with pytest.raises(InputError, match="an adapter without a tokenizer; give that of its base, org/base"):
        load_tokenizer(tmp_path)


def test_a_folder_that_hides_a_hub_name_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert refusal("gpt2").startswith("gpt2: no checkpoint in this folder; if the hub's gpt2 is meant, rename the")
    assert "the hub's" not in refusal(tmp_path / "gpt2")  # an absolute path is no name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "pytorch_model-00001-of-00002.bin",
            ["pickled weights without", "config.json", "pytorch_model.bin.index.json"],
        ),
        ("weights.bin", ["pickled weights; give a folder with config.json and model.safetensors"]),
        ("tf_model.h5", ["weights of TensorFlow; with transformers 4", "from_tf=True"]),
        ("flax_model.msgpack", ["weights of Flax; with transformers 4", "from_flax=True"]),
        ("tiny-q8.gguf", ["a model of llama.cpp", "gguf_file='tiny-q8.gguf'"]),
        ("model.onnx", ["an exported graph; give the folder that it was exported from"]),
        ("model.ckpt-1000.index", ["weights in OpenAI's own format; give the hub's gpt2"]),
        ("model.pkl", ["pickled weights", "config.json and model.safetensors"]),
    ],
)
def test_weights_in_another_format_are_named_in_a_folder_and_as_a_file(name, parts, tmp_path):
    folder = tmp_path / "model"
    touch(folder / name)
    for path, start in ((folder, f"{folder}: {name}: "), (folder / name, f"{folder / name}: ")):
        line = refusal(path)
        assert line.startswith(f"{start}{parts[0].partition(';')[0]}")
        for part in parts:
            assert part.format(folder=folder) in line
    write(
        folder, config={"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 9}
    )
    assert name in refusal(folder)


def test_other_folders_and_files_stay_as_they_are_called(tmp_path):
    touch(tmp_path / "notes.txt")
    assert kind_of_weights(tmp_path) is kind_of_weights(tmp_path / "notes.txt") is None
    assert models_within(tmp_path) == []
    assert "no checkpoint here" in refusal(tmp_path)
    assert "a file, not a folder" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize("head", ["score.weight", "classifier.weight", "multiple_choice_head.summary.bias", "v_head.x"])
def test_a_head_that_is_no_language_model_is_named(head, byte, tmp_path):
    theirs_of(byte, tmp_path / "base")
    change_weights(tmp_path / "base", lambda values: values | {head: torch.zeros(2, 32)})
    line = refusal(tmp_path / "base")
    assert f"holds {head}, the head of a classifier" in line
    compile(line.split('python -c "')[1].removesuffix('"'), "command", "exec")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(name, byte, tmp_path):
    theirs_of(byte, tmp_path)
    (tmp_path / name).write_text(LFS)
    assert refusal(tmp_path) == (
        f"{tmp_path / name}: git-lfs's pointer, not the file; run git lfs install and git lfs pull in its folder"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vocab.txt", "WordPiece"), ("spiece.model", "sentencepiece"), ("tokenizer.model", "sentencepiece")],
)
@pytest.mark.parametrize("rows", [300, 50257])
def test_tokenizers_of_other_kinds_are_recognised_by_their_files(name, kind, rows, byte, tmp_path):
    theirs_of(byte, tmp_path, vocab_size=rows)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    touch(tmp_path / name)
    assert f"{name}: a tokenizer of the kind {kind} is not supported" in refusal(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert f"a tokenizer of the kind {kind}" in refusal(tmp_path)
