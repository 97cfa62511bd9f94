"""The model card: what it tells, what the hub reads from its top, and what stays out of it."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from report_helpers import FAST, make_run

from gpt.model import ModelConfig
from gpt.report.card import card_body, facts_of, front_matter
from gpt.text.examples import chat_template
from gpt.text.tokenizer import load_tokenizer

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)
BYTE = load_tokenizer("byte")
SHARD = ["train_000000.bin", 3000, "a" * 64]
STATE = {
    "progress": {"step": 40, "tokens": 4000, "train_seconds": 90.0},
    "config": {"data": "/home/ann/secret/data", "out": "/home/ann/out", "init": "", "lr": 0.01, "optimizer": "muon"}
    | {"global_batch_size": 8, "dropout": 0.0, "n_layer": 2, "threads": 3},
    "runtime": {"torch": "2.13.0", "device": "cpu x86_64", "precision": "float32", "world_size": 1},
    "base": None,
}


def step_folder(tmp_path, state=STATE, records=FAST):
    """Makes the checkpoint at step 40 of a run, without weights, and returns its path."""
    folder = make_run(tmp_path / "run", records, data=str(tmp_path / "data"), lr=0.5) / "step-000000040"
    (folder / "training").mkdir(parents=True)
    mask = ["train_000000.mask", 3000, "d" * 64]
    manifest = {"step": 40, "dataset": {"train": [SHARD, mask], "val": []}}
    manifest |= {"tokenizer": {"name": "byte", "vocab_size": 257}}
    (folder / "training/manifest.json").write_text(json.dumps(manifest))
    if state is not None:
        (folder / "training/state.json").write_text(json.dumps(state))
    return folder


def make_dataset(folder, sha256=SHARD[2]):
    shard = {"name": SHARD[0], "tokens": 3000, "sha256": sha256, "documents": 7, "source_bytes": 9000}
    source = {"inputs": ["/home/ann/secret/my_poems.txt"], "holds": "messages"}
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"splits": {"train": [shard], "val": []}, "source": source}))


def test_the_card_tells_size_data_settings_and_losses_up_to_its_step(tmp_path):
    make_dataset(tmp_path / "data")
    state = STATE | {"config": STATE["config"] | {"data": str(tmp_path / "data")}}
    card = card_body(facts_of(step_folder(tmp_path, state), CONFIG, BYTE), "my *model*")
    assert card.startswith("# my \\*model\\*\n")
    parameters = 257 * 32 + 64 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert f"{parameters:,} parameters: 2 layers of width 32, 2 heads, a context of 64 tokens" in card
    assert "Its tokenizer is byte, with 257 ids." in card
    assert "- data: conversations of my\\_poems.txt: 3,000 tokens to learn from\n" in card
    assert "- length: 40 steps, 4,000 tokens, 1 min 30 s of training\n" in card
    assert "lr = 0.01\n" in card
    assert "<summary>Settings, without those that are 0 or off</summary>" in card
    assert not any(name in card for name in ("dropout", "n_layer", "threads"))  # off, told above, of the machine
    assert "the loss fell from 5.0000 to 3.2000" in card and "| perplexity | 148.4 | 24.5 |" in card
    assert "3.3000" not in card  # the evaluation at step 60


def test_the_card_names_no_folder_of_the_user(tmp_path):
    make_dataset(tmp_path / "data")
    for data in ("/home/ann/secret/data", str(tmp_path / "data")):
        base = {"base": {"init": "/home/ann/base", "sha256": "c" * 64}, "config": STATE["config"] | {"data": data}}
        facts = facts_of(step_folder(tmp_path / data[1:].replace("/", "_"), STATE | base), CONFIG, BYTE)
        card = front_matter(facts) + card_body(facts, "x")
        assert "ann" not in card and str(tmp_path) not in card and "base_model" not in card
        assert "Fine-tuned from base." in card and "- base: base\n" in card


def test_data_that_have_changed_since_are_not_described(tmp_path):
    make_dataset(tmp_path / "data", sha256="b" * 64)
    state = STATE | {"config": STATE["config"] | {"data": str(tmp_path / "data")}}
    card = card_body(facts_of(step_folder(tmp_path, state), CONFIG, BYTE), "x")
    assert "- data: 3,000 tokens to learn from\n" in card and "poems" not in card


@pytest.mark.parametrize("init", ["gpt2", "org/some-model"])
def test_the_hub_reads_the_top_of_the_card(tmp_path, init):
    facts = facts_of(step_folder(tmp_path, STATE | {"base": {"init": init, "sha256": "c" * 64}}), CONFIG, BYTE)
    for given, stored in (("apache-2.0", "apache-2.0"), ("", "unknown")):
        card = ModelCard(front_matter(facts, given) + "\n" + card_body(facts, "x"))
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": stored,
            "base_model": init,
            "tags": ["gpt2", "gpt-text-generator"],
        }
        assert card.text.strip().startswith("# x")


def test_a_checkpoint_without_trainer_state_is_described_by_the_files_of_its_run(tmp_path):
    card = card_body(facts_of(step_folder(tmp_path, state=None), CONFIG, BYTE), "x")
    assert "after 40 steps" in card and "| nats per token | 5.0000 | 3.2000 |" in card
    assert "lr = 0.5" in card and "- data: 3,000 tokens" in card


def test_files_that_are_missing_or_damaged_leave_facts_out(tmp_path):
    folder = step_folder(tmp_path, records=b"{")
    (folder / "training/state.json").write_text("{")
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/config.toml").unlink()
    card = card_body(facts_of(folder, CONFIG, BYTE), "x")
    assert "- data: 3,000 tokens" in card
    assert "Did it work" not in card and "settings" not in card


def test_the_card_of_a_model_from_elsewhere_names_it_as_the_base(tmp_path):
    facts = facts_of(tmp_path, CONFIG, BYTE, "org/model")
    assert "base_model: org/model\n" in front_matter(facts)
    card = card_body(facts, "x")
    assert "Converted from org/model." in card and "What went in" not in card and "settings" not in card
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    assert "base_model: gpt2\n" in front_matter(facts_of(tmp_path, CONFIG, BYTE, str(tmp_path)))


def test_a_relative_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret/base").mkdir(parents=True)
    facts = facts_of(tmp_path, CONFIG, replace(BYTE, name="secret"), "secret/base")
    card = front_matter(facts) + card_body(facts, "x")
    assert (
        "Its tokenizer has 257 ids. Converted from base." in card and "secret" not in card and "base_model" not in card
    )


def test_the_lines_to_paste_ask_a_chat_model_by_messages(tmp_path):
    assert '"role": "user"' not in card_body(facts_of(tmp_path, CONFIG, BYTE), "x")
    chat = BYTE.with_chat_template(chat_template(BYTE))
    assert '"role": "user"' in card_body(facts_of(tmp_path, CONFIG, chat), "x")
