"""What a run tells: metrics.jsonl on disks that fill up, terminals that go away, exit.json."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT
from training_helpers import QUICK, make_data, metrics, step_names, train_here

from gpt.checkpoint.read import verify_checkpoint
from gpt.errors import InputError, IntegrityError, NonFiniteError, ResourceError, Stopped, tell
from gpt.train import log as log_module
from gpt.train import metrics_file
from gpt.train.log import Log, exit_record
from gpt.train.metrics_file import MetricsFile, cut_metrics
from gpt.train.ranks import Ranks

SHORT = ("--max_steps", 6, "--warmup_steps", 0, "--log_every", 1, "--eval_every", 0)


def record_of(step):
    return {
        "step": step,
        "tokens": step * 100,
        "loss": 4.0 / (step + 1),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tok_per_s": 5.0,
        "mfu": 0.1,
        "train_seconds": 2.0 * step,
    }


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


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


# ---- a disk that fills up


@contextlib.contextmanager
def limited(size):
    """Within this context no file of this process can grow beyond `size` bytes: no test may report in it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fault_041_what_a_full_disk_does_not_take_is_written_when_it_has_room_again(tmp_path, capsys):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(record_of(1))
    with limited(file.path.stat().st_size + 20):  # the second line gets in partly
        for step in (2, 3, 4):
            file.write(record_of(step))
        with pytest.raises(ResourceError, match=r"metrics\.jsonl: .*; free some space"):
            file.sync()
    assert capsys.readouterr().err.count("warning:") == 1
    file.write(record_of(5))
    file.sync()
    assert metrics(tmp_path) == [record_of(step) for step in range(1, 6)]
    with limited(file.path.stat().st_size):
        file.write(record_of(6))
        file.write(record_of(7))
        file.close()
    first, last = capsys.readouterr().err.strip().splitlines()  # a second time it is told again
    assert "warning:" in first
    assert "2 lines are lost" in last


def test_fault_037_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_numbers(tmp_path, monkeypatch):
    data, out = make_data(tmp_path / "data", val_size=0), tmp_path / "out"
    steps = iter(range(100))
    flush = MetricsFile.flush

    def flush_sometimes(self):
        if 1 <= next(steps) <= 5:
            full_disk()
        flush(self)

    monkeypatch.setattr(MetricsFile, "flush", flush_sometimes)
    run = train_here("tiny", "--data", data, "--out", out, *SHORT, "--save_every", 2, "--keep_last", 9)
    assert run.code == 0, run.stderr
    assert "warning: checkpoint at step 2 failed" in run.stderr
    assert [record["step"] for record in metrics(out)] == list(range(1, 7))
    assert "step-000000002" not in step_names(out)
    assert "step-000000006" in step_names(out)


def test_fault_037_a_disk_that_is_full_from_the_start_is_exit_5(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    monkeypatch.setattr(metrics_file, "write_durably", full_disk)
    with pytest.raises(ResourceError, match="No space left"):
        MetricsFile(tmp_path / "metrics.jsonl", 3)


# ---- cutting


def test_fault_041_lines_are_cut_by_a_new_file_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step}) + "\n" for step in range(6))
    path.write_text(text)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        cut_metrics(path, 3)
    assert (os.listdir(tmp_path), path.read_text()) == (["metrics.jsonl"], text)
    cut_metrics(path, 5)  # nothing to cut: nothing to write


@pytest.mark.parametrize("bad", [b'{"step": 2, "lo', b"7\n", b"[]\n", b"\n", b"{}\n", b"\xff\xfe\n", b"\x00\x00\x00"])
def test_lines_that_are_none_are_cut(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + bad)
    cut_metrics(path, 3)
    assert path.read_bytes() == b'{"step": 0}\n'


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
