"""Files of an earlier version, in tests/golden: this one reads the shards, continues the runs, gives the same texts."""

import json
import shutil

import pytest
from paths import ROOT
from training_helpers import metrics, train_here

import gpt
from gpt.text.reader import TokenReader, verify
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
RUNS = EXPECTED["runs"]
STEPS = [(run, step) for run, record in RUNS.items() for step in record["steps"]]


def load(path):
    return gpt.load(str(path), device="cpu", dtype="fp32", backend="eager")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_shards_hold_the_text_they_were_made_from(split):
    shards, tokenizer = open_dataset(GOLDEN / "shards").splits[split], load_tokenizer(str(GOLDEN / "shards"))
    for shard in shards:
        verify(shard, tokenizer.vocab_size)
    reader = TokenReader(shards, tokenizer.vocab_size)
    eot, *ids = reader.read(0, len(reader)).tolist()
    reader.close()
    assert eot == tokenizer.eot
    assert tokenizer.decode_bytes(ids) == (GOLDEN / f"{split}.txt").read_bytes()


@pytest.mark.parametrize("run, step", STEPS)
def test_a_checkpoint_goes_on_with_the_recorded_text(run, step):
    expected = RUNS[run]["steps"][step]
    length = len(expected["text"].encode())  # a byte a token
    [[completion]] = load(GOLDEN / run / step).generate([expected["prompt"]], max_new_tokens=length, temperature=0.0)
    assert completion.text == expected["text"]


@pytest.mark.parametrize("run, step", STEPS)
def test_a_checkpoint_gives_the_sentence_the_recorded_nats(run, step):
    score = load(GOLDEN / run / step).score(EXPECTED["sentence"])
    assert score.nats == pytest.approx(RUNS[run]["steps"][step]["nats"], rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_folder_leads_to_its_best_checkpoint(run):
    nats = RUNS[run]["steps"][RUNS[run]["best"]]["nats"]
    assert load(GOLDEN / run).score(EXPECTED["sentence"]).nats == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_with_its_own_settings_and_the_recorded_losses(run, tmp_path):
    out = tmp_path / run
    shutil.copytree(GOLDEN / run, out)
    flags = ("--max_steps", EXPECTED["resumed_to"], "--log_every", 1)
    done = train_here(out / "config.toml", "--data", GOLDEN / "shards", "--out", out, *flags)
    assert done.code == 0, done.stderr
    first = min(map(int, RUNS[run]["losses"]))
    losses = {str(record["step"]): record["loss"] for record in metrics(out) if record["step"] >= first}
    assert losses == pytest.approx(RUNS[run]["losses"], rel=1e-3)
