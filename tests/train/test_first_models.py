"""What a fine-tune starts from: models of transformers, nanoGPT and PEFT, first with the logits of the source."""

import json

import pytest
import torch
from adapter_helpers import adapted, save_adapter
from checkpoint_helpers import pickle_weights, theirs_of
from nanogpt_helpers import save_nanogpt
from training_helpers import in_process, make_data, metrics, snapshot, train_here

import sample
from gpt.checkpoint.read import find_model_folder, open_model
from gpt.text.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from gpt.train.start import load_base


def as_transformers(folder, byte, dtype=torch.float32, files=0):
    """Makes a folder of transformers; returns (what --init gets, logits of the source)."""
    theirs = theirs_of(byte, folder)
    if files:
        pickle_weights(folder, dtype, files=files)
    return folder, lambda ids: theirs.to(dtype).float()(ids).logits[:, -1, :257]


def as_nanogpt(folder, byte, bias):
    theirs = save_nanogpt(folder, bias=bias)
    save_tokenizer(byte, folder)
    return folder / "ckpt.pt", lambda ids: theirs(ids)[:, -1, :257]


def as_adapter(folder, byte):
    theirs_of(byte, folder / "base")
    tensors = save_adapter(folder / "adapter", folder / "base")
    theirs = adapted(folder / "base", tensors, lambda module: 3.0)
    return folder / "adapter", lambda ids: theirs(ids).logits[:, -1, :257]


SOURCES = {
    "safetensors": as_transformers,
    "fp16": lambda folder, byte: as_transformers(folder, byte, torch.float16, 1),
    "bin": lambda folder, byte: as_transformers(folder, byte, files=1),
    "sharded bin": lambda folder, byte: as_transformers(folder, byte, files=3),
    "nanoGPT": lambda folder, byte: as_nanogpt(folder, byte, True),
    "nanoGPT without biases": lambda folder, byte: as_nanogpt(folder, byte, False),
    "adapter": as_adapter,
}


@pytest.mark.parametrize("source", SOURCES)
def test_fault_082_a_model_of_any_source_starts_with_its_logits_trains_and_writes(source, tmp_path):
    byte = load_tokenizer("byte")
    init, logits = SOURCES[source](tmp_path / "source", byte)
    before = snapshot(tmp_path / "source")
    data = make_data(tmp_path / "data", train_size=3000, val_size=600)
    out = tmp_path / "out"
    settings = ("--init", init, "--data", data, "--out", out, "--block_size", "32", "--global_batch_size", "4")
    done = train_here("finetune", *settings, "--max_steps", "20", "--save_every", "20", "--lr", "1e-3")
    assert done.code == 0, done.stderr
    first = load_base(open_model(find_model_folder(init)), str(init), 64, StubCorpus())[0].eval()
    ids = torch.randint(0, 257, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(first(ids), logits(ids), atol=1e-4, rtol=0)
    losses = [record["val_loss"] for record in metrics(out) if "val_loss" in record]
    assert losses[-1] < losses[0]
    recorded = json.loads((out / "step-000000020/training/state.json").read_text())["base"]
    model = open_model(find_model_folder(init))
    assert recorded == {"init": str(init), "model": str(model.path), "sha256": model.sha256()}
    written = in_process(
        sample.main, "sample.py", out, "--prompt", "the sea", "--max_new_tokens", "8", "--device", "cpu"
    )
    assert written.code == 0, written.stderr
    assert written.stdout.startswith("the sea")
    assert snapshot(tmp_path / "source") == before


class StubCorpus:
    """Data of any tokenizer."""

    def check_tokenizer(self, *_):
        """Accepts it."""


@pytest.mark.parametrize("kind", ["nanoGPT", "adapter"])
def test_fault_081_out_may_not_be_where_a_base_of_another_kind_is(kind, tmp_path):
    byte = load_tokenizer("byte")
    init, _ = SOURCES[kind](tmp_path / "source", byte)
    data = make_data(tmp_path / "data", train_size=3000)
    outs = [tmp_path / "source"] if kind == "nanoGPT" else [init, tmp_path / "source/base"]
    before = snapshot(tmp_path / "source")
    for out in outs:
        done = train_here("finetune", "--init", init, "--data", data, "--out", out, "--max_steps", "1")
        assert done.code == 2
        assert "out holds the base checkpoint" in done.last
    assert snapshot(tmp_path / "source") == before


@pytest.mark.parametrize("source", ["nanoGPT", "adapter"])
def test_fault_079_data_of_another_tokenizer_names_that_of_the_base(source, tmp_path):
    init, _ = SOURCES[source](tmp_path / "source", load_tokenizer("byte"))
    tokenizer = train_bpe(["the sea was calm and a gull cried once " * 20], 270)
    data = make_data(tmp_path / "other", train_size=4000, tokenizer=tokenizer)
    done = train_here("finetune", "--init", init, "--data", data, "--out", tmp_path / "out", "--max_steps", "1")
    assert done.code == 2
    home = tmp_path / ("source/base" if source == "adapter" else "source")
    assert f"--tokenizer {home} " in done.last
    assert load_tokenizer(home).identity == load_tokenizer("byte").identity
