"""What is read from a run folder: points, the best of them, names, settings."""

import re

import pytest
from report_helpers import FAST, SLOW, history_of, make_run

from gpt.report.metrics import Point, common_loss, differing, finite, read_histories
from gpt.train.metrics_file import parse_record


def test_a_point_has_what_its_line_has(tmp_path):
    assert history_of(tmp_path / "run", FAST).points[:3] == [
        Point(0, 0, 0.0, None, 5.0),
        Point(10, 1000, 10.0, 4.0, None),
        Point(20, 2000, 20.0, 3.5, 3.6),
    ]


def test_a_run_that_was_only_evaluated_has_no_times(tmp_path):
    history = history_of(tmp_path / "run", [{"step": 0, "tokens": 0, "val_loss": 5.0}, {"step": 9, "val_loss": 4.0}])
    assert history.points == [Point(0, 0, 0.0, None, 5.0), Point(9, None, None, None, 4.0)]
    assert history.curve("val_loss", "step") == [(0, 5.0), (9, 4.0)]
    assert history.curve("val_loss", "seconds") == [(0.0, 5.0)]
    assert history.curve("loss", "step") == []


def test_where_steps_fall_back_what_was_written_later_holds(tmp_path):
    def record(step, **more):
        return {"step": step, "tokens": 10 * step} | more

    records = [
        record(1, loss=5.0),
        record(2, loss=4.0),
        record(3, loss=9.0),
        record(2, val_loss=4.5),  # the same step, made up for after a restart
        record(3, loss=3.0),
    ]
    points = history_of(tmp_path / "run", records).points
    assert [(point.step, point.loss, point.val_loss) for point in points] == [(1, 5, None), (2, 4, 4.5), (3, 3, None)]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00\x00\x00", b"\xff"])
def test_an_unfinished_last_line_is_ignored_without_a_warning(tmp_path, torn, capsys):
    history = history_of(tmp_path / "run", b'{"step": 1, "tokens": 5, "loss": 2.5}\n' + torn)
    assert [point.step for point in history.points] == [1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "bad", [b"7", b"[]", b"{}", b"\xff\xfe", b"\x00", b'{"step": -1}', b'{"step": "2"}', b"[" * 9999]
)
def test_damaged_lines_are_ignored_with_one_warning(tmp_path, bad, capsys):
    text = b'{"step": 1, "loss": 2.5}\n' + bad + b"\n" + bad + b'\n\n{"step": 3, "loss": 1.5}\n'
    assert history_of(tmp_path / "run", text).curve("loss", "step") == [(1, 2.5), (3, 1.5)]
    assert re.fullmatch(r"warning: .*metrics\.jsonl: 2 damaged lines ignored\n", capsys.readouterr().err)


def test_values_that_are_no_finite_numbers_leave_gaps(tmp_path):
    text = b'{"step": 1, "loss": 5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN, "val_loss": Infinity}\n'
    text += (
        b'{"step": 4, "loss": "2", "val_loss": true}\n{"step": 5, "loss": 1'
        + b"0" * 400
        + b'}\n{"step": 6, "loss": 4}\n'
    )
    history = history_of(tmp_path / "run", text)
    assert history.curve("loss", "step") == [(1, 5), (6, 4)]
    assert history.evaluations() == []
    assert finite(None) is None


def test_a_line_that_is_no_record_of_a_step_is_none():
    assert parse_record('{"step": 7}') == {"step": 7}
    for line in ("", "7", '{"step": "7"}', '{"step": 1e9}', '{"step": true}', '{"step": -1}', "[" * 100_000):
        assert parse_record(line) is None


def test_the_best_loss_is_the_lowest_after_the_first_step_and_the_first_of_equals(tmp_path):
    def history(name, losses):
        return history_of(tmp_path / name, [{"step": n, "val_loss": loss} for n, loss in enumerate(losses)])

    assert history("a", [1.0, 3.0, 2.0, 2.0, 4.0]).best().step == 2
    assert history("b", [1.0]).best() is None
    assert history("c", []).best() is None


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [make_run(tmp_path / name / "run", FAST) for name in ("a", "b")]
    assert [history.name for history in read_histories(folders)] == [str(folder) for folder in folders]
    assert read_histories([folders[0] / ".." / "run"])[0].name == "run"


@pytest.fixture
def two(tmp_path):
    """The run folders of FAST and SLOW, with settings."""
    return [make_run(tmp_path / "fast", FAST, lr=1e-3, out="a"), make_run(tmp_path / "slow", SLOW, lr=6e-4, out="b")]


def test_the_loss_that_all_runs_reach_is_the_worst_of_the_best_ones(two):
    assert common_loss(read_histories(two)) == 3.4
    assert common_loss([]) is None


def test_a_setting_that_one_run_lacks_differs_and_the_run_folder_never_does(two):
    assert differing(read_histories(two)) == {"lr": [1e-3, 6e-4]}
    (two[1] / "config.toml").write_text('out = "b"\n')
    assert differing(read_histories(two)) == {"lr": [1e-3, None]}


def test_a_run_without_readable_settings_differs_in_none(two, capsys):
    (two[1] / "config.toml").write_bytes(b"lr = \xff")
    assert differing(read_histories(two)) == {}
    assert "config.toml: settings not compared" in capsys.readouterr().err
    (two[1] / "config.toml").unlink()
    assert differing(read_histories(two)) == {}
    assert capsys.readouterr().err == ""
