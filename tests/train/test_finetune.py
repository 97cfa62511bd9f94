"""What a fine-tune leaves to the sizes of model and data, and warnings about mistakes that are easily made."""

import pytest
from training_helpers import make_data, make_examples, state_of, step_names, train_here

from gpt.train.budget import LengthConfig, RhythmConfig
from gpt.train.finetune import EPOCHS, LEARNING_RATES, Sizes, choose_by_size, epochs_for, rate_for
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


def chosen(optim=None, length=None, rhythm=None, batch_size=16, parameters=10**8, **sizes):
    """choose_by_size for settings that leave nothing to the sizes, unless others are given."""
    sizes = Sizes(parameters, **({"items": 1600, "train_tokens": 50_000, "val_tokens": 5_000} | sizes))
    length, rhythm = length or LengthConfig(max_epochs=2), rhythm or RhythmConfig(eval_every=5)
    return choose_by_size(optim or OptimConfig(lr=1e-4), length, rhythm, batch_size, sizes)


def test_only_what_is_left_to_the_sizes_is_chosen():
    assert chosen() == {}
    assert chosen(OptimConfig(lr=0)) == {"lr": rate_for(10**8)}
    assert chosen(length=LengthConfig(max_epochs=-1)) == {"max_epochs": epochs_for(1600)}
    for limit in ({"max_steps": 9}, {"max_tokens": 9}, {"max_minutes": 9.0}):
        assert chosen(length=LengthConfig(max_epochs=-1, **limit)) == {"max_epochs": 0}


def test_adapters_learn_ten_times_as_fast_and_never_faster_than_the_smallest_models():
    assert chosen(OptimConfig(lr=0), adapters=True) == {"lr": pytest.approx(5e-4)}
    assert chosen(OptimConfig(lr=0), parameters=10**6, adapters=True) == {"lr": 3e-3}
    assert chosen(OptimConfig(lr=1e-6), adapters=True) == {}


def test_evaluations_are_as_frequent_and_as_long_as_the_data_allow():
    seldom = RhythmConfig(eval_every=50)
    assert chosen(rhythm=seldom, items=160) == {"eval_every": 10}
    assert chosen(rhythm=seldom, items=7) == {"eval_every": 1}
    assert chosen(rhythm=seldom, items=7, val_tokens=0) == {}
    assert chosen(rhythm=RhythmConfig(eval_every=0), items=160) == {}  # no evaluations
    assert chosen(val_tokens=60_000) == {"eval_tokens": 50_000}
    assert chosen(train_tokens=500, val_tokens=10**9) == {"eval_tokens": 8192}
    assert chosen(rhythm=RhythmConfig(eval_every=5, eval_tokens=0), val_tokens=60_000) == {"eval_tokens": 50_000}


def test_a_fine_tune_says_what_it_chose_stores_it_and_keeps_it(tune, tmp_path):
    rate, epochs = rate_for(34_000), 10  # about 2,100 tokens are 65 windows of 32, and 4 steps
    done = tune("--stop_after_minutes", "1")
    assert done.code == 0, done.stderr
    assert f"info: by the size of model and data: lr {rate:g}, max_epochs {epochs}, eval_every 4\n" in done.stderr
    config = config_of(tmp_path / "out")
    assert (config["lr"], config["max_epochs"], config["eval_every"]) == (rate, epochs, 4)
    again = tune("--patience", "90")
    assert (again.code, again.stdout) == (0, "nothing to do: step 41 of 41\n"), again.stderr


def test_a_run_that_began_with_typed_values_keeps_them_where_they_are_left_out_later(tune, tmp_path):
    assert tune("--lr", "1e-3", "--max_epochs", "1").code == 0
    assert tune().stdout == "nothing to do: step 5 of 5\n"
    done = train_here("--resume", tmp_path / "out", "--lr", "0", "--max_epochs", "-1", "--max_steps", "6")
    assert done.code == 0 and "setting changed" not in done.stderr
    assert config_of(tmp_path / "out")["lr"] == 1e-3


def test_what_is_typed_holds_and_so_do_rate_and_length_of_another_preset(tune, made, tmp_path):
    done = tune("--lr", "1e-3", "--max_epochs", "1", "--eval_every", "50", "--min_lr", "1e-4")
    assert done.code == 0 and "by the size" not in done.stderr
    config = config_of(tmp_path / "out")
    assert (config["lr"], config["max_epochs"], config["eval_every"]) == (1e-3, 1, 50)
    (tmp_path / "mine.toml").write_text("lr = 2e-3\nmax_steps = 2\neval_every = 1\n")
    own = tmp_path / "mine.toml", "--out", tmp_path / "own"
    done = train_here(*own, "--init", tmp_path / "out", "--data", made / "data")
    assert done.code == 0 and "by the size" not in done.stderr


def test_the_floor_of_the_rate_may_be_typed_alone(tune):
    assert tune("--min_lr", "1e-6", "--max_steps", "1").code == 0
    done = tune("--min_lr", "1", "--max_steps", "1")
    assert done.code == 2 and "min_lr 1.0 must be between 0 and lr" in done.last


def test_epochs_of_examples_follow_from_their_number(tune, tmp_path):
    """310 short examples are 5 epochs long; as windows of 32 tokens they would be fewer than 300."""
    data = make_examples(tmp_path / "data", [([65, 66, 67, 256], 2)] * 310)
    done = tune("--max_steps", "1", data=data, out=tmp_path / "limited")
    assert done.code == 0 and "max_epochs" not in done.stderr
    done = tune("--global_batch_size", "310", data=data)
    assert done.code == 0 and config_of(tmp_path / "out")["max_epochs"] == 5


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


def test_a_learning_rate_of_training_from_scratch_is_warned_of(tune, tmp_path):
    words = "is one for training from scratch"
    assert words in tune("--lr", "3e-2", "--max_steps", "1").stderr
    assert words not in tune("--lr", "1e-2", "--max_steps", "1", out=tmp_path / "low").stderr
    assert words not in tune("--lr", "3e-2", "--max_steps", "1", "--optimizer", "muon", out=tmp_path / "muon").stderr


def test_a_run_of_few_steps_is_warned_of_unless_it_was_asked_for(tune, tmp_path):
    data = make_data(tmp_path / "data", train_size=600, val_size=0)
    said = "warning: the whole run has 5 steps: the model will learn little; give a smaller --global_batch_size"
    assert said in tune("--max_epochs", "4", data=data).stderr
    for limit in (("--max_steps", "4"), ("--max_tokens", "200"), ("--max_epochs", "9", "--max_steps", "2")):
        asked = tune(*limit, data=data, out=tmp_path / limit[0])
        assert asked.code == 0 and "the whole run" not in asked.stderr
