"""report.md: before and after, the answers of both models, where they come from, and what is written when."""

import json
import re
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import load_transformers
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
from gpt.checkpoint.read import find_model_folder
from gpt.report.metrics import Point
from gpt.report.report import curve, duration, fenced, heading, prompt_texts, verdict
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
    assert f"info: report: {folder / 'tuned/report.md'} (Ctrl-C skips it)\n" in done.stderr
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
    assert f"Yes: on text kept back from this run, the loss fell from {first[0]:.4f} to {best[0]:.4f}" in text


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
    assert f"`{tuned / 'data'}`: {train_tokens:,} tokens to read, {val_tokens:,} tokens kept back" in text
    assert f"fine-tuned from `{tuned / 'base'}`" in text
    state = json.loads((tuned / "tuned/latest/training/state.json").read_text())
    assert all(f"\n{name} = {json.dumps(value)}\n" in text for name, value in list(state["config"].items())[1:])
    [command] = [line for line in blocks(text)[-1].splitlines() if "sample.py" in line]
    python, program, *words = shlex.split(command)
    assert Path(program).name == "sample.py"
    done = in_process(sample.main, program, *words, "--max_new_tokens", "4")
    assert (python, done.code) == ("python", 0)


def test_a_run_from_scratch_shows_its_own_answers_alone(tuned):
    text = report_of(tuned / "base")
    assert "trained from scratch" in text and "**before**" not in text and "**the model**" in text
    assert "Yes:" not in text and "| on the validation text | after 8 steps |" in text


def test_examples_are_asked_by_their_prompts(tmp_path):
    data = make_examples(tmp_path / "data", random_examples(20, longest=30), val=[([65, 66, 67, 68, 69], 2)])
    done = train_here("tiny", "--data", data, "--out", tmp_path / "out", "--max_steps", "1", "--warmup_steps", "0")
    assert done.code == 0, done.stderr
    prompt, _, expected = blocks(report_of(tmp_path / "out"))[:3]
    assert (prompt, expected) == ("ABC", "DE")
    text = report_of(tmp_path / "out")
    assert "20 examples of " in text and "--prompt ABC" in text


def test_without_a_validation_set_the_report_says_that_nobody_knows_and_its_paths_exist(tmp_path):
    data = make_data(tmp_path / "data", val_size=0)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "out", *EIGHT_STEPS).code == 0
    text = report_of(tmp_path / "out")
    assert "Nobody knows" in text and "**the prompt**" not in text
    [upload] = [line for line in blocks(text)[-1].splitlines() if line.startswith("hf upload")]
    words = shlex.split(upload, comments=True)
    assert (Path(words[3]) / "model.safetensors").is_file()
    assert words[4] == "--exclude"
    names = ["training/state.json", "adapter/adapter_config.json", "config.json", "model.safetensors"]
    assert [name for name in names if not fnmatch(name, words[5])] == names[
        2:
    ]  # the others name folders of this machine


@pytest.fixture
def copied(tuned, tmp_path):
    """A copy of the run `tuned`, and its command: again(*flags, steps)."""
    run = tmp_path / "run"
    shutil.copytree(tuned / "tuned", run, symlinks=True)
    own = ("--init", tuned / "base", "--data", tuned / "data", "--out", run, *EIGHT_STEPS[2:])
    return run, lambda steps, *flags: train_here(*(flags or own), "--max_steps", steps)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt, "no memory"])
def test_a_report_that_fails_is_a_warning_and_the_same_command_makes_it_up(copied, monkeypatch, error):
    run, again = copied
    (run / "report.md").unlink()

    def fail(*_args, **_keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory") if error == "no memory" else error

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_report", fail)
        done = again("8")
    assert (done.code, done.stdout) == (0, "nothing to do: step 8 of 8\n")
    assert f"warning: {run / 'report.md'} was not written: " in done.stderr
    assert not (run / "report.md").exists()
    assert again("8").code == 0
    assert "**before**" in report_of(run)
    written = (run / "report.md").stat().st_mtime_ns
    assert again("8").code == 0 and (run / "report.md").stat().st_mtime_ns == written


def test_a_fault_of_the_program_in_a_report_is_not_hidden(copied, monkeypatch):
    _, again = copied
    monkeypatch.setattr(train, "write_report", lambda *_: [].pop())
    with pytest.raises(IndexError):
        again("9")


def test_a_run_that_goes_on_by_its_path_reports_anew_and_still_knows_its_base(copied):
    run, again = copied
    assert again("9", "--resume", run).code == 0
    assert "**before**" in report_of(run) and "9 steps" in report_of(run)


def test_the_best_checkpoint_answers_even_if_it_is_not_the_last(copied):
    run, again = copied
    (run / "report.md").unlink()
    assert json.loads((run / "latest/training/state.json").read_text())["progress"]["best_step"] == 8
    (run / "best.txt").write_text("step-000000004\n")
    model = run / "step-000000004/model.safetensors"
    answered, load = [], train.load_stored

    def loaded(stored, **more):
        answered.append(stored.files)
        return load(stored, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_stored", loaded)
        assert again("8").code == 0
    assert answered[-1] == [model]


def test_a_base_that_is_gone_is_said_and_left_out(copied, tuned, monkeypatch):
    run, again = copied
    (run / "report.md").unlink()
    gone = lambda path: find_model_folder(tuned / "gone" if Path(path) == tuned / "base" else path)  # noqa: E731
    monkeypatch.setattr("gpt.train.start.find_model_folder", gone)
    done = again("9", "--resume", run)
    assert done.code == 0 and f"the report lacks the answers of the base model {tuned / 'base'}: " in done.stderr
    assert "**before**" not in report_of(run) and "**the model**" in report_of(run)


# ---- the parts


def test_a_loss_that_did_not_fall_or_was_never_finite_is_said():
    first, worse = Point(0, 0, 0, None, 2.0), Point(9, 9, 9, None, 2.5)
    assert verdict(first, worse, True).startswith("No: ")
    assert verdict(first, first, True).startswith("No: ")
    assert "never a finite number" in verdict(None, None, True)


def test_the_table_of_evaluations_is_short_with_the_first_and_the_last(tmp_path):
    records = [{"step": step, "tokens": step, "val_loss": 5 - step / 100} for step in range(101)]
    rows = curve(history_of(tmp_path / "run", records)).splitlines()[2:]
    steps = [int(row.split("|")[1]) for row in rows]
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 100) and steps == sorted(set(steps))


@pytest.mark.parametrize("text", ["plain", "a ``` fence", "`````", "# no heading", "\x1b[2J"])
def test_no_text_of_a_model_leaves_its_block_or_reaches_the_terminal_raw(text):
    [shown] = prompt_texts({"the prompt": [text], "after": [text], "in the data": ["expected"]})
    assert "\x1b" not in shown
    assert [block.replace("\\x1b", "\x1b") for block in blocks(shown)] == [text, text, "expected"]


def test_names_and_times_are_readable():
    assert heading("a_run*[x]\n") == "a\\_run\\*\\[x\\]\\\\x0a"
    assert [duration(s) for s in (0.2, 61, 3600, 90061)] == ["0 s", "1 min 1 s", "1 h", "25 h 1 min 1 s"]
    assert fenced("x", "sh") == "```sh\nx\n```"
