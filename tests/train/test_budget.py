"""How long a run is: the four limits, patience, the clock, best loss."""

import math
from dataclasses import asdict

import pytest

from gpt.train.budget import BatchConfig, Budget, LengthConfig, Progress


def budget(**limits):
    """A run of 8 windows of 32 tokens a step over 100 windows an epoch."""
    return Budget(LengthConfig(**limits), global_batch_size=8, block_size=32, windows_per_epoch=100)


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
        progress.advance(8, 32)
        made += 1
    assert made == progress.step == steps
    assert (progress.windows_seen, progress.tokens) == (8 * steps, 256 * steps)


def test_max_minutes_ends_a_run_whose_steps_take_a_second_after_sixty_of_them():
    run, progress = budget(max_minutes=1.0), Progress()
    while not run.spent(progress):
        progress.advance(8, 32)
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
        progress.advance(8, 32)
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
    assert len(LengthConfig(-1, -1, -1.0, -1.0, -1).problems()) == 5
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
