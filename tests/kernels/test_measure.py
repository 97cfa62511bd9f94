"""The measurement behind `auto`: which way wins, by what margin, and that it is made once for a machine."""

import time

import pytest

from gpt.kernels import measure
from gpt.kernels.measure import faster


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gpt-text-generator"


class Clock:
    """A clock that ways of known duration advance."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def way(self, *seconds):
        """Returns a way that takes these seconds, one after another, the last again and again."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.mark.parametrize(
    ("plain", "other", "wins"), [(0.010, 0.005, True), (0.010, 0.0095, False), (0.010, 0.009, True), (0.01, 0.1, False)]
)
def test_another_way_is_chosen_only_if_it_is_a_tenth_faster(monkeypatch, plain, other, wins):
    clock = Clock(monkeypatch)
    assert faster("a", lambda: (clock.way(plain), clock.way(other))) is wins


def test_the_best_round_counts_because_other_programs_only_slow_a_round_down(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(measure, "BUDGET", 10)
    assert faster("a", lambda: (clock.way(0.010), clock.way(0.9, 0.15, 0.15, 0.15, 0.004, 0.15)))


@pytest.mark.parametrize(("duration", "calls"), [(5.0, 1), (0.06, 2), (0.001, 1 + measure.ROUNDS)])
def test_slow_ways_are_run_less_often(monkeypatch, duration, calls):
    clock, done = Clock(monkeypatch), []
    way = clock.way(duration)
    faster("a", lambda: (way, lambda: done.append(way())))
    assert len(done) == calls


def test_the_answer_is_kept_for_the_next_program(monkeypatch, cache):
    assert faster("a", lambda: (lambda: time.sleep(0.01), lambda: None))
    assert len(list(cache.glob("measured-*.json"))) == 1

    def again():
        raise AssertionError("measured again")

    assert faster("a", again)
    assert not faster("b", lambda: (lambda: None, lambda: time.sleep(0.01)))
    assert faster("a", again)


def test_an_answer_that_another_program_falsified_is_corrected_after_a_day(monkeypatch):
    clock, calendar = Clock(monkeypatch), [1_000_000_000]
    monkeypatch.setattr(measure.time, "time", lambda: calendar[0])
    for hours, other, answer in ((0, 0.020, False), (23, 0.005, False), (2, 0.005, True), (23, 0.020, True)):
        calendar[0] += hours * 3600
        assert faster("a", lambda other=other: (clock.way(0.010), clock.way(other))) is answer
    calendar[0] -= 48 * 3600  # the clock was set back
    assert not faster("a", lambda: (clock.way(0.010), clock.way(0.020)))


def test_between_two_ways_that_are_about_equal_the_answer_stays_the_same(monkeypatch):
    clock, calendar = Clock(monkeypatch), [1_000_000_000]
    monkeypatch.setattr(measure.time, "time", lambda: calendar[0])
    for other, answer in ((0.0095, False), (0.0085, True), (0.0105, True), (0.0115, False), (0.0095, False)):
        calendar[0] += 25 * 3600
        assert faster("a", lambda other=other: (clock.way(0.010), clock.way(other))) is answer


WRONG = [
    b'{"a": {"faster": false, "time": "1"}}',
    b'{"a": {"faster": 0, "time": 9999999999}}',
    b'{"a": {"faster": false, "time": 1' + b"0" * 4000 + b"}}",
]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": true}', b"\xff", b"[" * 100_000, *WRONG])
def test_fault_124_a_damaged_file_of_answers_is_measured_anew(cache, content):
    cache.mkdir()
    measure.answers_path().write_bytes(content)
    assert faster("a", lambda: (lambda: time.sleep(0.01), lambda: None))
    assert measure.read_answers()["a"]["faster"] is True


def test_without_a_cache_folder_or_one_that_can_be_written_to_it_measures_each_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert faster("a", lambda: (lambda: time.sleep(0.01), lambda: None))
