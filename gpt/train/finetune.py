"""Settings of a fine-tune that follow from the size of the model and of the data, and warnings about mistakes that are
easily made.

Learning rates: those for small models were measured here (benchmarks/README.md, "Learning rate of a fine-tune"); those
for GPT-2's sizes are published ones: 6.25e-5 for 117M parameters (Radford et al. 2018, GPT-1), 5e-5 as the default of
transformers' trainer, 3e-5 for 1.5B in nanoGPT's example. Models learn at lower rates the larger they are."""

import math

from gpt.errors import note
from gpt.train.budget import BY_SIZE, Budget, LengthConfig, Progress
from gpt.train.optim import OptimConfig

LEARNING_RATES = (  # a model of fewer parameters: peak learning rate of AdamW
    (10_000_000, 3e-3),
    (50_000_000, 5e-4),
    (250_000_000, 5e-5),
    (math.inf, 3e-5),
)
EPOCHS = (  # data of fewer windows or examples: passes over them
    (300, 10.0),
    (1_000, 5.0),
    (30_000, 3.0),
    (100_000, 2.0),
    (math.inf, 1.0),
)
PRETRAINING = 8  # a learning rate so many times that of the table is one for training from scratch
FEW_STEPS = 20


def rate_for(parameters: int) -> float:
    """Returns the peak learning rate with which AdamW fine-tunes a model of so many parameters."""
    return next(rate for limit, rate in LEARNING_RATES if parameters < limit)


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


def choose_by_size(
    optim: OptimConfig, length: LengthConfig, eval_every: int, batch_size: int, parameters: int, items: int
) -> dict[str, float]:
    """Returns the settings of a fine-tune that are left to its sizes, name -> value: `lr` and `max_epochs` where they
    are 0 and BY_SIZE, and a smaller `eval_every` where an epoch has fewer steps. The model has `parameters` parameters,
    an epoch has `items` windows or examples."""
    chosen: dict[str, float] = {}
    if optim.lr == 0:
        chosen["lr"] = rate_for(parameters)
    if length.max_epochs == BY_SIZE:
        chosen["max_epochs"] = epochs_for(items)
    steps = max(1, items // batch_size)
    if eval_every > steps:
        chosen["eval_every"] = steps
    return chosen


def warn_of_mistakes(optim: OptimConfig, budget: Budget, parameters: int) -> None:
    """Warns if the learning rate of a new fine-tune is one for training from scratch, or if the run has so few steps
    that the model will hardly learn."""
    usual = rate_for(parameters)
    if optim.optimizer == "adamw" and optim.lr >= PRETRAINING * usual:
        note(
            "warning",
            f"lr {optim.lr:g} is one for training from scratch: the model may forget what it has learned; "
            f"for {parameters:,} parameters {usual:g} is usual",
        )
    steps = budget.total_steps(Progress())
    if steps < FEW_STEPS and not (budget.length.max_steps or budget.length.max_minutes or budget.follows_slot()):
        note(
            "warning",
            f"the whole run has {steps} steps: the model will learn little; give a smaller --global_batch_size "
            f"(now {budget.global_batch_size}) or more --max_epochs",
        )
