"""What a run tells: terminals that go away, exit.json."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT
from training_helpers import QUICK, full_disk, make_data, metrics, record_of

from gpt.checkpoint.read import verify_checkpoint
from gpt.errors import InputError, IntegrityError, NonFiniteError, ResourceError, Stopped, tell
from gpt.train import log as log_module
from gpt.train.log import Log, exit_record
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
