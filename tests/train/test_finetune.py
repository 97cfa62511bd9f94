"""What a fine-tune leaves to the sizes of model and data, and warnings about mistakes that are easily made."""

import pytest
from training_helpers import make_data, state_of, step_names, train_here

from gpt.train.budget import LengthConfig
from gpt.train.finetune import EPOCHS, LEARNING_RATES, choose_by_size, epochs_for, rate_for
from gpt.train.optim import OptimConfig


@pytest.fixture
def tune(made, tmp_path):
    """tune(*flags, data) fine-tunes the run of the fixture `made` into the folder `out`."""

    def command(*flags, data=made / "data", out=tmp_path / "out"):
        return train_here("--init", made / "run", "--data", data, "--out", out, *flags)

    return command


def config_of(run):
    return state_of(run, int(step_names(run)[-1].removeprefix("step-")))["config"]


def test_a_smaller_model_learns_faster_and_less_text_is_read_more_often():
    rates = [rate_for(size) for size in (2_000_000, 30_000_000, 124_000_000, 1_500_000_000)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(LEARNING_RATES)
    passes = [epochs_for(items) for items in (1, 500, 5_000, 50_000, 5_000_000)]
    assert passes == sorted(passes, reverse=True) and len(set(passes)) == len(EPOCHS)


def test_only_what_is_left_to_the_sizes_is_chosen():
    by_size, own = OptimConfig(lr=0), OptimConfig(lr=1e-4)
    epochs = LengthConfig(max_epochs=-1)
    assert choose_by_size(own, LengthConfig(max_epochs=2), 5, 16, 10**8, 1600) == {}
    assert choose_by_size(by_size, epochs, 5, 16, 10**8, 1600).keys() == {"lr", "max_epochs"}
    assert choose_by_size(own, LengthConfig(max_steps=9), 50, 16, 10**8, 160) == {"eval_every": 10}
    assert choose_by_size(own, LengthConfig(max_steps=9), 50, 16, 10**8, 7) == {"eval_every": 1}
    assert choose_by_size(own, LengthConfig(max_steps=9), 0, 16, 10**8, 160) == {}  # 0: no evaluations


def test_a_fine_tune_says_what_it_chose_stores_it_and_keeps_it(tune, tmp_path):
    done = tune("--max_steps", "2")
    assert done.code == 0, done.stderr
    rate, epochs = rate_for(13_000), 10  # about 2,100 tokens are 65 windows of 32, and 4 steps
    assert f"info: by the size of model and data: lr {rate:g}, max_epochs {epochs}\n" in done.stderr
    config = config_of(tmp_path / "out")
    assert (config["lr"], config["max_epochs"], config["eval_every"]) == (rate, epochs, 4)
    again = tune("--max_steps", "4")
    assert again.code == 0, again.stderr
    assert "continuing" in again.stderr and "setting changed" not in again.stderr
    config = config_of(tmp_path / "out")
    assert (config["lr"], config["max_epochs"], config["eval_every"]) == (rate, epochs, 4)


def test_what_is_typed_or_stands_in_a_preset_of_the_users_holds(tune, made, tmp_path):
    done = tune("--lr", "1e-3", "--max_epochs", "1", "--eval_every", "50")
    assert done.code == 0 and "by the size" not in done.stderr
    config = config_of(tmp_path / "out")
    assert (config["lr"], config["max_epochs"], config["eval_every"]) == (1e-3, 1, 50)
    (tmp_path / "mine.toml").write_text("lr = 2e-3\nmax_steps = 2\n")
    done = train_here(
        tmp_path / "mine.toml", "--init", tmp_path / "out", "--data", made / "data", "--out", tmp_path / "2"
    )
    assert done.code == 0 and "by the size" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("tiny", "--lr", "0"), "lr 0.0 must be above 0"),
        (("tiny", "--max_epochs", "-1"), "max_epochs -1 (by the size of the data) needs --init"),
        (("--init", "BASE", "--max_epochs", "-2"), "max_epochs -2.0 must be 0 or more"),
        (("--init", "BASE", "--lr", "-1e-4"), "lr -0.0001 must be above 0"),
        (("--init", "BASE", "--optimizer", "muon"), "give --lr for muon"),
    ],
)
def test_fault_097_what_no_size_can_decide_is_refused(flags, message, made, tmp_path):
    flags = [made / "run" if word == "BASE" else word for word in flags]
    done = train_here(*flags, "--data", made / "data", "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.last
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_of_training_from_scratch_is_warned_of(tune):
    assert "is one for training from scratch" in tune("--lr", "3e-2", "--max_steps", "1").stderr
    assert "is one for training from scratch" not in tune("--lr", "1e-2", "--max_steps", "2").stderr


def test_a_run_of_few_steps_is_warned_of_unless_it_was_asked_for(tune, tmp_path):
    data = make_data(tmp_path / "data", train_size=600, val_size=0)
    said = "warning: the whole run has 5 steps: the model will learn little; give a smaller --global_batch_size"
    assert said in tune("--max_epochs", "4", data=data).stderr
    asked = tune("--max_steps", "4", data=data, out=tmp_path / "asked")
    assert asked.code == 0 and "the whole run" not in asked.stderr
