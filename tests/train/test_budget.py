"""How long a run is: the four limits, patience, the clock, best loss."""

import math
from dataclasses import asdict

import pytest

from gpt.train.budget import BY_THE_CLOCK, BatchConfig, Budget, LengthConfig, Progress, SampleTimes


def budget(**limits):
    """A run of 8 windows of 32 tokens a step over 100 windows an epoch."""
    return Budget(LengthConfig(**limits), global_batch_size=8, mean_tokens=32, windows_per_epoch=100)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_tokens": 256}, 1),
        ({"max_tokens": 257}, 2),
        ({"max_tokens": 2560}, 10),
        ({"max_epochs": 1.0}, 13),  # 12.5 batches
        ({"max_epochs": 2.0}, 25),
        ({"max_epochs": 0.5}, 7),
        ({"max_steps": 9, "max_tokens": 2560, "max_epochs": 1.0}, 9),
        ({"max_steps": 11, "max_tokens": 2560, "max_epochs": 1.0}, 10),
        ({"max_steps": 99, "max_tokens": 10**9, "max_epochs": 1.0}, 13),
    ],
)
def test_the_first_limit_reached_ends_the_run(limits, steps):
    run = budget(**limits)
    progress, made = Progress(), 0
    while not run.spent(progress):
        assert run.total_steps(progress) == steps
        progress.advance(8, 8 * 32)
        made += 1
    assert made == progress.step == steps
    assert (progress.windows_seen, progress.tokens) == (8 * steps, 256 * steps)


def test_max_minutes_ends_a_run_whose_steps_take_a_second_after_sixty_of_them():
    run, progress = budget(max_minutes=1.0), Progress()
    while not run.spent(progress):
        progress.advance(8, 8 * 32)
        progress.train_seconds += 1.0
    assert progress.step == 60
    assert run.total_steps(progress) == 60


def test_under_max_minutes_the_length_is_estimated_from_the_pace():
    run, progress = budget(max_minutes=2.0), Progress()
    progress.step, progress.train_seconds = 10, 5.0
    assert run.total_steps(progress) == 10 + (120 - 5) / 0.5
    progress.step, progress.train_seconds = 100, 110.0
    assert run.total_steps(progress) == 100 + math.ceil(10 / 1.1)


def test_max_minutes_and_max_steps_together_stop_at_the_first():
    run, progress = budget(max_minutes=1.0, max_steps=20), Progress()
    while not run.spent(progress):
        progress.advance(8, 8 * 32)
        progress.train_seconds += 1.0
        assert run.total_steps(progress) <= 20
    assert progress.step == 20
    progress = Progress(step=5, train_seconds=61.0)
    assert run.spent(progress)


def test_patience_ends_a_run_after_so_many_evaluations_without_a_new_best():
    run, progress = budget(max_steps=100, patience=2), Progress(step=1)
    outcomes = []
    for loss in [3.0, 2.0, 2.5, 1.9, 1.9, 5.0]:
        outcomes.append((progress.evaluated(loss), run.spent(progress)))
    assert outcomes == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (progress.best_loss, progress.evals_without_best) == (1.9, 2)


def test_without_patience_a_run_goes_on_whatever_the_losses():
    run, progress = budget(max_steps=100), Progress()
    for _ in range(50):
        progress.evaluated(9.0)
    assert not run.spent(progress)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss):
    progress = Progress(step=1)
    assert not progress.evaluated(loss)
    assert progress.best_loss is None
    assert progress.evaluated(3.0)
    assert not progress.evaluated(loss)
    assert progress.best_loss == 3.0


def test_something_due_every_so_many_steps_is_due_then_only():
    assert [step for step in range(1, 13) if Progress(step=step).due(4)] == [4, 8, 12]
    assert not any(Progress(step=step).due(0) for step in range(10))


def test_progress_survives_as_plain_data():
    progress = Progress(3, 24, 768, 1.5, 2.5, 2, 1, 4, "abc")
    assert Progress(**asdict(progress)) == progress


@pytest.mark.parametrize(("total", "micro"), [(8, 3), (12, 5), (480, 7), (7, 6)])
def test_fault_075_a_micro_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(total, micro):
    [problem] = BatchConfig(total, micro).problems()
    divisors = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - micro))
    assert str(total) in problem
    assert str(micro) in problem
    assert str(divisors[:2]) in problem


def test_fault_097_limits_below_zero_and_a_run_without_end_are_refused():
    assert LengthConfig(max_steps=1).problems() == []
    [problem] = LengthConfig().problems()
    assert all(name in problem for name in ("max_steps", "max_tokens", "max_epochs", "max_minutes"))
    assert len(LengthConfig(-1, -1, -2.0, -1.0, -1).problems()) == 5
    assert BatchConfig(0, 0).problems()
    assert BatchConfig(8, -1).problems()
    assert BatchConfig(8, 4).problems() == BatchConfig(8, 0).problems() == []


def test_the_loss_before_the_first_step_is_noted_but_never_the_best():
    progress = Progress()
    assert not progress.evaluated(1.0)
    assert (progress.best_loss, progress.evals_without_best) == (None, 0)
    assert not progress.evaluation_due(every=1, always=True)


def test_evaluations_are_due_every_so_many_steps_and_at_the_end_once():
    for step, at_end, due in ((0, False, False), (2, False, False), (3, False, True), (4, True, True)):
        progress = Progress(step=step)
        assert progress.evaluation_due(3, at_end) is due
        progress.evaluated(1.0)
        assert not progress.evaluation_due(3, at_end)


@pytest.mark.parametrize(("limit", "value"), [("max_tokens", 2560), ("max_epochs", 2.0)])
def test_a_batch_size_changed_on_resume_does_not_change_where_tokens_and_epochs_end(limit, value):
    progress = Progress(step=10, windows_seen=20)  # of 2 each, half of the 40 windows of 64 tokens
    budget = Budget(LengthConfig(**{limit: value}), 4, 64, 20)
    assert budget.total_steps(progress) == 10 + 20 // 4


# ---- slots, reasons, samples


def test_a_slot_sets_the_length_only_where_nothing_else_does():
    progress = Progress(step=10, train_seconds=5.0)
    assert budget(max_steps=100, stop_after_minutes=1).total_steps(progress) == 100
    alone = budget(stop_after_minutes=1)
    assert alone.total_steps(progress) == 10 + 120
    alone.slot_seconds = 10.0
    assert alone.total_steps(progress) == 10 + 20
    alone.slot_seconds = -1.0
    assert alone.total_steps(progress) == 11
    assert not alone.spent(progress)  # the next slot goes on


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_steps": 7}, "max_steps 7 reached"),
        ({"max_steps": 700, "max_tokens": 1792}, "max_tokens 1792 reached"),
        ({"max_epochs": 0.5, "max_steps": 50}, "max_epochs 0.5 reached"),
        ({"max_minutes": 1.5, "max_steps": 50}, "max_minutes 1.5 reached"),
        ({"max_steps": 700, "patience": 2}, "no new best in 3 evaluations (patience)"),
    ],
)
def test_the_limit_that_ended_a_run_is_named(limits, reason):
    progress = Progress(step=7, windows_seen=56, tokens=1792, train_seconds=90.0, evals_without_best=3)
    assert budget(**limits).spent(progress)
    assert budget(**limits).reason(progress) == reason


def asked(every, moments, evaluated=(), start=0):
    """Returns the steps at which a sample is due, asked at step start, start + 1, … at these seconds."""
    progress = Progress(step=start)
    times, due = SampleTimes(every, lambda: moments[progress.step - start]), []
    for _ in moments:
        if progress.step in evaluated:
            progress.evaluated_step = progress.step
        if times.due(progress):
            due.append(progress.step)
        progress.step += 1
    return due


def test_lines_by_the_clock_come_at_0_5_20_and_60_seconds_and_then_at_evaluations():
    moments = [100.0 + step for step in range(100)]
    assert asked(BY_THE_CLOCK, moments, evaluated=range(0, 100, 10)) == [0, 5, 20, 60, 70, 80, 90]


def test_a_step_in_which_several_moments_pass_gets_one_line():
    assert asked(BY_THE_CLOCK, [0.0, 30.0, 31.0, 61.0, 62.0], evaluated=[4]) == [0, 1, 3, 4]


def test_every_so_many_steps_there_is_a_sample_but_none_again_where_a_run_continues():
    assert asked(4, [0.0] * 13) == [4, 8, 12]
    assert asked(4, [0.0] * 9, start=4) == [8, 12]


def test_0_prints_no_samples():
    assert asked(0, [float(second) for second in range(100)], evaluated=range(100)) == []
