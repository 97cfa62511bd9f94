"""Settings of a fine-tune that follow from the size of the model and of the data, and warnings about mistakes that are
easily made.

Learning rates: those for small models were measured here (benchmarks/README.md, "Learning rate of a fine-tune"); those
for GPT-2's sizes are published ones: 6.25e-5 for 117M parameters (Radford et al. 2018, GPT-1), 5e-5 as the default of
transformers' trainer, 3e-5 for 1.5B in nanoGPT's example. Models learn at lower rates the larger they are."""

import math
from typing import NamedTuple

from gpt.errors import note
from gpt.train.budget import BY_SIZE, Budget, LengthConfig, Progress, RhythmConfig
from gpt.train.optim import OptimConfig

LEARNING_RATES = (  # a model of fewer parameters: peak learning rate of AdamW
    (10_000_000, 3e-3),
    (50_000_000, 5e-4),
    (250_000_000, 5e-5),
    (math.inf, 3e-5),
)
ADAPTERS_LEARN = 10  # times that rate, at most the first (Schulman et al. 2025, thinkingmachines.ai/blog/lora)
EPOCHS = (  # data of fewer windows or examples: passes over them
    (300, 10.0),
    (1_000, 5.0),
    (30_000, 3.0),
    (100_000, 2.0),
    (math.inf, 1.0),
)
PRETRAINING = 8  # a learning rate so many times that of the table is one for training from scratch
FEW_STEPS = 20
LEAST_EVAL_TOKENS = 8192  # an evaluation reads so many tokens, or as many as there are to learn from, if that is more
LEFT_TO_SIZES: dict[str, float] = {"lr": 0, "max_epochs": BY_SIZE}  # the values that leave a setting to the sizes


def rate_for(parameters: int, adapters: bool = False) -> float:
    """Returns the peak learning rate with which AdamW fine-tunes a model of so many parameters, or `adapters` of it."""
    rate = next(rate for limit, rate in LEARNING_RATES if parameters < limit)
    return min(ADAPTERS_LEARN * rate, LEARNING_RATES[0][1]) if adapters else rate


def epochs_for(items: int) -> float:
    """Returns the number of passes over `items` windows or examples that a fine-tune takes at most: `patience` may end
    it earlier."""
    return next(epochs for limit, epochs in EPOCHS if items < limit)


def problems_by_size(optim: OptimConfig, length: LengthConfig, has_base: bool) -> list[str]:
    """Returns what is wrong, in words, with settings that are left to the sizes of a fine-tune; empty if nothing is.
    `has_base`: the run is a fine-tune."""
    problems = []
    if optim.lr == 0 and not has_base:
        problems.append(f"lr {optim.lr} must be above 0")
    if optim.lr == 0 and has_base and optim.optimizer != "adamw":
        problems.append(f"lr 0 (by the size of the model) is for optimizer adamw: give --lr for {optim.optimizer}")
    if length.max_epochs == BY_SIZE and not has_base:
        problems.append(f"max_epochs {BY_SIZE} (by the size of the data) needs --init")
    return problems


class Sizes(NamedTuple):
    """What the settings of a fine-tune follow from."""

    parameters: int  # of the model
    items: int  # windows or examples of an epoch
    train_tokens: int
    val_tokens: int  # 0: there is no validation set
    adapters: bool = False  # alone are trained


def choose_by_size(
    optim: OptimConfig, length: LengthConfig, rhythm: RhythmConfig, batch_size: int, sizes: Sizes
) -> dict[str, float]:
    """Returns the settings of a fine-tune that follow from its sizes, name -> value: `lr` and `max_epochs` where they
    are left to them (no limit of epochs if another limit is set), and an `eval_every` and `eval_tokens` that are small
    enough for the data."""
    chosen: dict[str, float] = {}
    if optim.lr == LEFT_TO_SIZES["lr"]:
        chosen["lr"] = rate_for(sizes.parameters, sizes.adapters)
    if length.max_epochs == LEFT_TO_SIZES["max_epochs"]:
        has_limit = length.max_steps or length.max_tokens or length.max_minutes
        chosen["max_epochs"] = 0.0 if has_limit else epochs_for(sizes.items)
    if not sizes.val_tokens:
        return chosen
    steps = max(1, sizes.items // batch_size)
    if rhythm.eval_every > steps:
        chosen["eval_every"] = steps
    enough = max(sizes.train_tokens, LEAST_EVAL_TOKENS)
    if enough < min(rhythm.eval_tokens or math.inf, sizes.val_tokens):
        chosen["eval_tokens"] = enough
    return chosen


def warn_of_mistakes(optim: OptimConfig, budget: Budget, parameters: int, adapters: bool) -> None:
    """Warns if the learning rate of a new fine-tune is one for training from scratch, or if epochs give the run so few
    steps that the model will hardly learn."""
    usual = rate_for(parameters, adapters)
    if optim.optimizer == "adamw" and optim.lr >= PRETRAINING * usual:
        note(
            "warning",
            f"lr {optim.lr:g} is one for training from scratch: the model may forget what it has learned; "
            f"for {parameters:,} parameters {usual:g} is usual",
        )
    steps = budget.steps_left(Progress()).get("max_epochs", FEW_STEPS)
    if steps < FEW_STEPS and steps == budget.total_steps(Progress()):
        note(
            "warning",
            f"the whole run has {steps} steps: the model will learn little; give a smaller --global_batch_size "
            f"(now {budget.global_batch_size}) or more --max_epochs",
        )
