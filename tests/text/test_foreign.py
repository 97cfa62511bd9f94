"""Folders and files that are not what the user thinks: one line names them, and the command that helps."""

import json

import pytest
import torch
from checkpoint_helpers import change_weights, theirs_of
from foreign_helpers import write

from gpt.checkpoint.read import find_model_folder, load_pretrained
from gpt.errors import InputError
from gpt.text.foreign import kind_of_folder, kind_of_weights
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


def test_a_trainers_folder_names_its_newest_checkpoint(tmp_path):
    for step in (500, 1500, 900):
        write(tmp_path / f"checkpoint-{step}", config={"model_type": "gpt2"})
    newest = tmp_path / "checkpoint-1500"
    assert refusal(tmp_path) == f"{tmp_path}: a Trainer's output folder; give its newest checkpoint, {newest}"
    with pytest.raises(InputError, match="give its newest checkpoint"):
        load_tokenizer(tmp_path)


def test_an_adapter_names_its_base_and_the_command_that_merges_them(tmp_path):
    folder = tmp_path / "tuned"
    write(folder, adapter_config={"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    touch(folder / "adapter_model.safetensors")
    line = refusal(folder)
    assert line.startswith(
        f"{folder}: an adapter for org/base, not a model; merge them and give {folder}-merged: python"
    )
    code = line.split('python -c "')[1].removesuffix('"')
    compile(code, "command", "exec")
    assert "merge_and_unload" in code
    assert f"T.from_pretrained('org/base').save_pretrained('{folder}-merged')" in code


def test_the_hubs_cache_names_the_model_and_the_snapshot(tmp_path):
    folder = tmp_path / "models--org--tiny"
    (folder / "snapshots/0123abc").mkdir(parents=True)
    assert refusal(folder) == f"{folder}: the hub's cache of org/tiny; give org/tiny, or {folder}/snapshots/0123abc"
    (tmp_path / "models--gpt2/snapshots/4567").mkdir(parents=True)
    assert "give gpt2, or" in refusal(tmp_path / "models--gpt2")


def test_a_folder_that_hides_a_hub_name_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert refusal("gpt2").startswith("gpt2: no checkpoint in this folder; if the hub's gpt2 is meant, rename the")
    assert "the hub's" not in refusal(tmp_path / "gpt2")  # an absolute path is no name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pytorch_model.bin", ["pickled weights, which are not read", "M.from_pretrained('{folder}').save_pretrained"]),
        ("pytorch_model-00001-of-00002.bin", ["pickled weights"]),
        ("tf_model.h5", ["weights of TensorFlow; with transformers 4", "from_tf=True"]),
        ("flax_model.msgpack", ["weights of Flax; with transformers 4", "from_flax=True"]),
        ("tiny-q8.gguf", ["a model of llama.cpp", "gguf_file='tiny-q8.gguf'"]),
        ("model.onnx", ["an exported graph; give the folder that it was exported from"]),
        ("ckpt.pt", ["a pickled checkpoint, as nanoGPT writes it", "config.json and model.safetensors"]),
        ("model.ckpt-1000.index", ["weights in OpenAI's own format; give the hub's gpt2"]),
        ("model.pth", ["pickled weights"]),
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
    assert kind_of_folder(tmp_path) is kind_of_weights(tmp_path) is kind_of_weights(tmp_path / "notes.txt") is None
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


def test_find_model_folder_names_them_too(tmp_path):
    write(tmp_path / "checkpoint-5", config={})
    with pytest.raises(InputError, match="a Trainer's output folder"):
        find_model_folder(tmp_path)
