"""The slot of a command: when it is over, and that the last checkpoint is written before its end."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from paths import ROOT
from training_helpers import EIGHT_STEPS, QUICK, fingerprint, make_data, metrics, step_names, train_here

from gpt.train import slot as slot_module
from gpt.train.slot import SAFETY, Slot, command_seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on; the command began when it shows 0."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(slot_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(slot_module, "command_seconds", lambda: clock.now)
    return clock


def checkpoint_time(slot, clock, step_seconds, save_seconds, evaluation_seconds=0.0):
    """Runs steps until the slot is over, with an evaluation every tenth and a save every twentieth; returns when the
    last checkpoint is written."""
    for step in range(1, 10**6):
        if slot.over():
            clock.now += save_seconds
            return clock.now
        clock.now += step_seconds + (evaluation_seconds if step % 10 == 0 else 0)
        if step % 20 == 0:
            clock.now += save_seconds
            slot.saved(save_seconds)
    raise AssertionError


@pytest.mark.parametrize("starts_at", [0.0, 7.5])
@pytest.mark.parametrize(
    ("step", "save", "evaluation"), [(0.1, 0.05, 0.0), (1.0, 4.0, 0.0), (0.5, 10.0, 8.0), (20, 1, 0)]
)
def test_the_last_checkpoint_is_written_in_the_slot_and_not_long_before_its_end(
    clock, starts_at, step, save, evaluation
):
    clock.now = starts_at
    end = checkpoint_time(Slot(10, save_bytes=int(1e8)), clock, step, save, evaluation)
    longest = step + evaluation
    assert 600 - longest - SAFETY * max(save, 1.3) + save <= end <= 600


def test_without_a_slot_it_is_never_over(clock):
    slot = Slot(0)
    clock.now = 1e9
    assert not slot.over()


def test_once_over_it_stays_over(clock):
    slot = Slot(1)
    clock.now = 60.0
    assert slot.over()
    slot.longest_gap, slot.end = 0.0, 1e9
    assert slot.over()


def test_the_age_of_the_process_counts_only_where_it_was_started_for_this_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--data", "x"])
    assert command_seconds() == 0.0
    code = "import sys, time; time.sleep(0.5); from gpt.train.slot import command_seconds; print(command_seconds())"
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code, "tiny"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0.5 <= float(shown.stdout) <= time.monotonic() - started + 0.02


# ---- runs


def slots_of(monkeypatch, steps):
    """Makes the slot of each run end after `steps` questions of whether it is over."""

    def over(self):
        self.questions = getattr(self, "questions", 0) + 1
        self.is_over = self.end < float("inf") and self.questions > steps
        return self.is_over

    monkeypatch.setattr(Slot, "over", over)


def test_a_run_in_slots_exits_with_75_each_time_and_ends_as_a_run_without(made, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ("tiny", "--data", made / "data", "--out", out, *EIGHT_STEPS, "--stop_after_minutes", 1)
    slots_of(monkeypatch, 5)
    codes = []
    while not codes or codes[-1] == 75:
        done = train_here(*words)
        codes.append(done.code)
        if done.code == 75:
            assert "stopped: stop_after_minutes 1 at step" in done.last
            assert done.last.endswith("the same command continues")
            assert json.loads((out / "exit.json").read_text())["code"] == 75
    assert codes[0] == 75
    assert codes[-1] == 0, done.stderr
    assert fingerprint(out, 8) == fingerprint(made / "run", 8)


def test_a_slot_that_ends_after_the_run_changes_nothing(made, tmp_path):
    out = tmp_path / "run"
    done = train_here("tiny", "--data", made / "data", "--out", out, *EIGHT_STEPS, "--stop_after_minutes", 60)
    assert done.code == 0, done.stderr
    assert fingerprint(out, 8) == fingerprint(made / "run", 8)


def test_a_slot_alone_gives_the_schedule_its_length_and_a_new_one_to_each_slot(made, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = ("tiny", "--data", made / "data", "--out", out, "--max_steps", 0, "--stop_after_minutes", 0.05)
    words += ("--log_every", 1, "--eval_every", 0, "--save_every", 0, "--warmup_steps", 0, "--schedule", "linear")
    monkeypatch.setattr(slot_module, "SAVE_SECONDS", 0.05)
    monkeypatch.setattr(slot_module, "command_seconds", lambda: 0.0)
    first = train_here(*words)
    assert first.code == 75, first.stderr
    rates = [record["lr"] for record in metrics(out)]
    assert rates[-1] < 0.3 * rates[1]
    second = train_here(*words)
    assert (second.code, "nothing to do" in second.stdout) == (75, False)
    again = [record["lr"] for record in metrics(out)[len(rates) :]]
    assert again[1] > 2 * rates[-1]
    assert again[-1] < 0.3 * again[1]


@pytest.mark.slow
def test_the_last_checkpoint_of_the_command_line_is_written_in_its_slot(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    words = ["tiny", "--data", str(data), "--out", str(out), "--max_steps", "1000000", "--stop_after_minutes", "0.25"]
    started = time.time()
    done = subprocess.run([sys.executable, "train.py", *words, *QUICK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    newest = out / step_names(out)[-1]
    assert 8 < (newest / "training/manifest.json").stat().st_mtime - started < 15
