"""report.md: before and after, the answers of both models, where they come from, and what is written when."""

import json
import re
import shlex
import shutil

import pytest
import torch
from checkpoint_helpers import load_transformers
from paths import ROOT
from report_helpers import history_of
from training_helpers import (
    EIGHT_STEPS,
    REPORT,
    in_process,
    make_data,
    make_examples,
    metrics,
    random_examples,
    train_here,
)

import sample
import train
from gpt.report.metrics import Point
from gpt.report.report import Answer, answer_text, curve, duration, fenced, heading, verdict
from gpt.text.reader import TokenReader
from gpt.text.shards import open_dataset


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    monkeypatch.setattr(train, "report", REPORT)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with a run `base`, the run `tuned` that began with it, and its `data`."""
    folder = tmp_path_factory.mktemp("report")
    old, data = (make_data(folder / name, seed=seed) for name, seed in (("old", 0), ("data", 7)))
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "report", REPORT)
    for words in (("--out", folder / "base", "tiny", "--data", old), ("--init", folder / "base", "--data", data)):
        out = () if words[0] == "--out" else ("--out", folder / "tuned")
        done = train_here(*words, *out, *EIGHT_STEPS)
        assert done.code == 0, done.stderr
    patch.undo()
    assert f"info: report: {folder / 'tuned/report.md'}\n" in done.stderr
    return folder


def report_of(run):
    return (run / "report.md").read_text(encoding="utf-8")


def blocks(text):
    """Returns the code blocks of a text in Markdown."""
    return [block for _, block in re.findall(r"^(`{3,})\w*\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)]


def theirs_after(folder, ids, tokens):
    """Returns the bytes that a model of transformers continues with, greedily; a byte is an id, 256 is end-of-text."""
    model = load_transformers().GPT2LMHeadModel.from_pretrained(folder).eval()
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": 256, "pad_token_id": 256}
    settings |= {"attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    chosen = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
    return bytes(chosen[: chosen.index(256)] if 256 in chosen else chosen)


def test_before_and_after_are_the_evaluations_of_the_run(tuned):
    values = [(r["val_loss"], r["val_bpb"]) for r in metrics(tuned / "tuned") if "val_loss" in r]
    first, best = values[0], min(values[1:])
    text = report_of(tuned / "tuned")
    assert f"| nats per token | {first[0]:.4f} | {best[0]:.4f} |" in text
    assert f"| bits per byte | {first[1]:.4f} | {best[1]:.4f} |" in text
    assert f"Yes: on text that it never learned from, the loss fell from {first[0]:.4f} to {best[0]:.4f}" in text


def test_both_models_continue_prompts_of_the_validation_text_as_in_transformers(tuned):
    reader = TokenReader(open_dataset(tuned / "data").splits["val"], 257)
    held_out = bytes(reader.read(1, len(reader) - 1).tolist())
    texts = blocks(report_of(tuned / "tuned"))
    asked = [texts[i : i + 4] for i in (0, 4, 8) if held_out.count(texts[i].encode()) == 1]
    assert asked  # all but those that begin with end-of-text, or within a character
    for prompt, before, after, expected in asked:
        place = held_out.index(prompt.encode())
        ids = list(held_out[place : place + 16])  # half a context; a block has no blanks at its end
        assert bytes(ids).decode(errors="replace").rstrip() == prompt
        assert held_out[place + 16 :].decode(errors="replace").startswith(expected.rstrip("\ufffd"))
        for name, text in (("base", before), ("tuned", after)):
            assert text.startswith(theirs_after(tuned / name / "best", ids, 16).decode(errors="ignore").rstrip())


def test_the_report_says_what_went_in_and_the_command_in_it_runs(tuned):
    text = report_of(tuned / "tuned")
    train_tokens, val_tokens = (open_dataset(tuned / "data").tokens(split) for split in ("train", "val"))
    assert f"`{tuned / 'data'}`: {train_tokens:,} tokens to learn from, {val_tokens:,} to validate on" in text
    assert f"fine-tuned from `{tuned / 'base'}`" in text
    state = json.loads((tuned / "tuned/latest/training/state.json").read_text())
    assert all(f"\n{name} = {json.dumps(value)}\n" in text for name, value in list(state["config"].items())[1:])
    [command] = [line for line in blocks(text)[-1].splitlines() if "sample.py" in line]
    python, program, *words = shlex.split(command)
    done = in_process(sample.main, str(ROOT / program), *words, "--max_new_tokens", "4")
    assert (python, done.code) == ("python", 0)


def test_a_run_from_scratch_shows_its_own_answers_alone(tuned):
    text = report_of(tuned / "base")
    assert "trained from scratch" in text and "**before**" not in text and "**after**" in text
    assert "Yes:" not in text and "| on the validation text | after 8 steps |" in text


def test_examples_are_asked_by_their_prompts(tmp_path):
    data = make_examples(tmp_path / "data", random_examples(20), val=[([65, 66, 67, 68, 69], 2)])
    done = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--max_steps", "1", "--warmup_steps", "0")
    assert done.code == 0, done.stderr
    prompt, _, expected = blocks(report_of(tmp_path / "out"))[:3]
    assert (prompt, expected) == ("ABC", "DE")


def test_without_a_validation_set_the_report_says_that_nobody_knows(tmp_path):
    data = make_data(tmp_path / "data", val_size=0)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "out", *EIGHT_STEPS).code == 0
    text = report_of(tmp_path / "out")
    assert "Nobody knows" in text and "**the prompt**" not in text


def test_what_cannot_be_written_is_a_warning_and_the_next_end_of_the_run_writes_it(tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned / "base", run, symlinks=True)
    again = ("tiny", "--data", tuned / "old", "--out", run, *EIGHT_STEPS[2:], "--max_steps")
    (run / "report.md").unlink()
    (run / "report.md").mkdir()
    done = train_here(*again, "9")
    assert (done.code, f"warning: {run / 'report.md'} was not written: " in done.stderr) == (0, True)
    (run / "report.md").rmdir()
    assert train_here(*again, "10").code == 0
    assert "10 steps" in report_of(run)


# ---- the parts


def test_a_loss_that_did_not_fall_is_said():
    first, worse = Point(0, 0, 0, None, 2.0), Point(9, 9, 9, None, 2.5)
    assert verdict(first, worse).startswith("No: ")
    assert verdict(first, first).startswith("No: ")


def test_the_table_of_evaluations_is_short_with_the_first_and_the_last(tmp_path):
    records = [{"step": step, "tokens": step, "val_loss": 5 - step / 100} for step in range(101)]
    rows = curve(history_of(tmp_path / "run", records)).splitlines()[2:]
    steps = [int(row.split("|")[1]) for row in rows]
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 100) and steps == sorted(set(steps))


@pytest.mark.parametrize("text", ["plain", "a ``` fence", "`````", "# no heading", "\x1b[2J"])
def test_no_text_of_a_model_leaves_its_block_or_reaches_the_terminal_raw(text):
    shown = answer_text(Answer(text, "expected", {"after": text}))
    assert "\x1b" not in shown
    assert [block.replace("\\x1b", "\x1b") for block in blocks(shown)] == [text, text, "expected"]


def test_names_and_times_are_readable():
    assert heading("a_run*[x]\n") == "a\\_run\\*\\[x\\]\\\\x0a"
    assert [duration(s) for s in (0.2, 61, 3600, 90061)] == ["0 s", "1 min 1 s", "1 h", "25 h 1 min 1 s"]
    assert fenced("x", "sh") == "```sh\nx\n```"
