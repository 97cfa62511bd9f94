"""What a run tells: terminals that go away, exit.json."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from paths import ROOT
from training_helpers import QUICK, full_disk, make_data, metrics, record_of, tiny_model

from gpt.checkpoint.read import verify_checkpoint
from gpt.errors import InputError, IntegrityError, NonFiniteError, ResourceError, Stopped, tell
from gpt.train import log as log_module
from gpt.train.budget import Progress
from gpt.train.log import Log, Recorder, exit_record
from gpt.train.ranks import Ranks

SHORT = ("--max_steps", 6, "--warmup_steps", 0, "--log_every", 1, "--eval_every", 0)


# ---- a terminal that goes away


def test_fault_036_a_reader_that_leaves_after_a_line_does_not_end_the_run(tmp_path):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    words = ["train.py", "tiny", "--data", str(data), "--out", str(out), *map(str, SHORT), *QUICK]
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        assert lines.readline()
    assert process.wait(timeout=120) == 0
    assert [record["step"] for record in metrics(out)] == list(range(1, 7))
    verify_checkpoint(out / "step-000000006")


@pytest.fixture
def terminal(monkeypatch):
    """stderr is a terminal; the fixture's value closes its window."""
    pty = pytest.importorskip("pty")
    window, end = pty.openpty()
    stream = os.fdopen(end, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    yield lambda: os.close(window)
    monkeypatch.undo()
    stream.close()


def test_fault_036_a_window_that_closes_takes_nothing_with_it(tmp_path, terminal):
    log = Log(tmp_path, 0, 5, lambda: None)
    log.advance(5)
    terminal()
    for step in (1, 2):
        log.advance(5)
        log.write(record_of(step) | {"val_loss": 1.0, "val_bpb": 2.0}, 5)
        tell("a sample")
    log.sync()
    log.close()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2]


def test_fault_036_without_any_stderr_all_is_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    log = Log(tmp_path, 0, 5, lambda: None)
    log.advance(5)
    log.write(record_of(1), 5)
    log.close()
    assert metrics(tmp_path) == [record_of(1)]
    assert capsys.readouterr().out == ""


# ---- speeds


class SlowDevice:
    """A device whose clock is simulated: the host launches a step in 0.02 seconds, the device computes it in one."""

    def __init__(self, monkeypatch, kind, log_every):
        self.now, self.done, self.records = 100.0, 100.0, []
        monkeypatch.setattr(log_module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(log_module, "peak_flops", lambda *_: 1e9)
        machine = SimpleNamespace(
            device=SimpleNamespace(type=kind), dtype=None, ranks=SimpleNamespace(size=1), fetch=self.fetch
        )
        self.progress = Progress()
        scaler = SimpleNamespace(check=lambda *_: None)
        state = SimpleNamespace(progress=self.progress, scaler=scaler, model=tiny_model())
        log = SimpleNamespace(advance=lambda _: None, write=lambda record, _: self.records.append(record))
        budget = SimpleNamespace(total_steps=lambda _: 100, spent=lambda _: False)
        self.recorder = Recorder(log, log_every, state, budget, None, machine)

    def fetch(self, finished_at):
        def wait():
            self.now = max(self.now, finished_at)
            return 3.0, 1.0, True

        return wait

    def step(self, is_async):
        started = self.now
        self.done = max(self.done, self.now + 0.02) + 1.0
        self.now = self.now + 0.02 if is_async else self.done
        seconds = self.now - started
        self.progress.advance(1, 50)
        self.recorder.step(1e-3, self.done, seconds)
        self.progress.train_seconds += seconds + self.recorder.waited
        self.recorder.waited = 0.0


@pytest.mark.parametrize("log_every", [1, 2, 5])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_first_speeds_are_those_of_all_others(kind, log_every, monkeypatch):
    device = SlowDevice(monkeypatch, kind, log_every)
    for step in range(1, 21):
        device.step(is_async=kind != "cpu")
        if step % 7 == 0:
            device.recorder.evaluated((3.0, 2.0))
            device.now += 50.0  # an evaluation, whose time does not count
    trained = [record for record in device.records if "loss" in record]
    assert len(trained) >= 20 // log_every - 1
    one_step = 1.02 if kind == "cpu" else 1.0
    for record in trained:
        assert record["tok_per_s"] == pytest.approx(50 / one_step, rel=0.025)
        assert record["mfu"] == pytest.approx(record["tok_per_s"] * device.recorder.flops_per_token / 1e9, abs=1e-4)
    last = trained[-1]
    assert last["train_seconds"] == pytest.approx(last["step"] * one_step, rel=0.025)


# ---- exit.json


def exit_json(folder):
    return json.loads((folder / "exit.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", [InputError, IntegrityError, NonFiniteError, ResourceError, Stopped])
def test_the_reason_of_a_failure_or_stop_stands_in_exit_json(tmp_path, kind):
    with pytest.raises(kind), exit_record(tmp_path, Ranks()):
        raise kind("x: y; z")
    assert exit_json(tmp_path) == {"code": kind.code, "reason": "x: y; z"}
    with exit_record(tmp_path, Ranks()):
        assert not (tmp_path / "exit.json").exists()
    assert not (tmp_path / "exit.json").exists()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("by 雨"), 1)])
def test_what_nobody_foresaw_stands_in_exit_json_too_and_goes_on(tmp_path, error, code):
    with pytest.raises(type(error)) as caught, exit_record(tmp_path, Ranks()):
        raise error
    assert caught.value is error
    assert exit_json(tmp_path)["code"] == code
    assert code == 130 or exit_json(tmp_path)["reason"] == "ZeroDivisionError('by 雨')"


def test_an_exit_json_that_cannot_be_written_does_not_hide_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "write_durably", full_disk)
    with pytest.raises(InputError, match="x: y; z"), exit_record(tmp_path, Ranks()):
        raise InputError("x: y; z")


# ---- when the losses are drawn


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """(Log, clock, times of its drawings): a Log with a clock that stands still."""
    clock, drawn_at = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr(log_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return Log(tmp_path, -1, 100, lambda: drawn_at.append(clock.now)), clock, drawn_at


EVALUATED = {"step": 1, "val_loss": 2.0, "val_bpb": 3.0}


def test_a_run_is_drawn_at_evaluations_only_and_never_two_of_them_within_two_minutes(watched):
    made, clock, drawn_at = watched
    for second in range(1, 1000):
        clock.now = 1000.0 + second
        made.write(EVALUATED if second % 50 == 0 else {"step": 1}, 100)
    assert [at - 1000 for at in drawn_at] == [150, 300, 450, 600, 750, 900]


def test_the_end_is_drawn_once_and_only_if_something_was_recorded(watched):
    made, clock, drawn_at = watched
    clock.now += 1000
    made.write(EVALUATED, 100)
    made.close()
    assert drawn_at == [2000.0]


def test_what_was_recorded_after_the_last_drawing_is_drawn_at_the_end(watched):
    made, _, drawn_at = watched
    made.write({"step": 2}, 100)
    made.close()
    assert len(drawn_at) == 1


def test_a_run_that_recorded_nothing_or_was_interrupted_is_not_drawn(watched):
    made, _, drawn_at = watched
    made.close()
    made.is_drawn = False
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        made.close()
    assert drawn_at == []


def test_a_second_ctrl_c_during_the_last_drawing_does_not_hide_that_the_run_was_saved(tmp_path):
    finished = []

    def interrupted():
        raise KeyboardInterrupt

    made = Log(tmp_path, -1, 100, interrupted, SimpleNamespace(finish=lambda: finished.append(True)))
    made.is_drawn = False
    made.close()
    assert finished == [True]
