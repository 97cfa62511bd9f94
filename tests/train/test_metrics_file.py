"""metrics.jsonl: disks that fill up, and cutting what lies beyond a checkpoint."""

import contextlib
import json
import os

import pytest
from training_helpers import full_disk, make_data, metrics, record_of, step_names, train_here

from gpt.errors import ResourceError
from gpt.train import metrics_file
from gpt.train.metrics_file import MetricsFile, cut_metrics


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
    run = train_here(
        "tiny",
        "--data",
        data,
        "--out",
        out,
        "--max_steps",
        6,
        "--warmup_steps",
        0,
        "--log_every",
        1,
        "--eval_every",
        0,
        "--save_every",
        2,
        "--keep_last",
        9,
    )
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


def test_metrics_beyond_the_checkpoint_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(6)) + '{"step": 2, "lo')
    cut_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    cut_metrics(tmp_path / "absent", 3)


def test_a_file_system_whose_inodes_change_by_themselves_is_not_watched(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.train.metrics_file.in_place", lambda path, descriptor: False)
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(record_of(1))
    file.sync()
    file.close()
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1]


@pytest.mark.parametrize("how", ["deleted", "replaced", "folder_moved"])
def test_fault_120_a_metrics_file_that_is_gone_is_noticed_at_the_next_record_and_never_made_anew(tmp_path, how, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    file.write(record_of(1))
    assert file.in_place()
    if how == "folder_moved":
        folder.rename(tmp_path / "away")
    else:
        file.path.rename(tmp_path / "old.jsonl")
    if how == "replaced":
        file.path.write_text("of another run\n")
    for step in (2, 3):
        file.write(record_of(step))
    with pytest.raises(
        ResourceError, match=r"metrics\.jsonl: was deleted, moved or replaced .*; give the command again"
    ):
        file.sync()
    file.close()
    assert capsys.readouterr().err.count("warning:") == 2  # at the first record, and the lines lost at the end
    assert file.path.exists() == (how == "replaced")
    assert how != "replaced" or file.path.read_text() == "of another run\n"


def test_fault_120_a_metrics_file_that_was_put_back_gets_all_its_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(record_of(1))
    file.path.rename(tmp_path / "away")
    file.write(record_of(2))
    (tmp_path / "away").rename(file.path)
    file.sync()
    assert metrics(tmp_path) == [record_of(1), record_of(2)]
