"""Several processes of one run: the numbers of one process, one writer, one end. Gloo on the CPU, two or three
ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from paths import ROOT
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.run import get_args_parser
from training_helpers import (
    QUICK,
    Outcome,
    Recording,
    fingerprint,
    make_data,
    make_examples,
    metrics,
    random_examples,
    snapshot,
    state_of,
    step_names,
    tiny_model,
    train_here,
)

import train
from gpt.errors import IntegrityError
from gpt.files import lock_folder
from gpt.loss import IGNORED
from gpt.model import GPT
from gpt.text.corpus import Corpus
from gpt.text.shards import open_dataset
from gpt.train import budget, setup, start
from gpt.train import ranks as ranks_module
from gpt.train import slot as slot_module
from gpt.train.budget import Progress
from gpt.train.optim import LossScaler
from gpt.train.ranks import Ranks, join, launched
from gpt.train.runtime import MachineConfig, Runtime
from gpt.train.saver import Saver
from gpt.train.slot import Slot
from gpt.train.state import State

LENGTH = 50
# With the preset's learning rate of 1e-2 rounding grows too much: even micro-batches of one process differ by 1e-3.
FLAGS = ("--lr", 1e-3, "--max_steps", LENGTH, "--log_every", 1, "--eval_every", 10, "--save_every", 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("ranks") / "data")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The run folder of LENGTH steps in one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert train_here("tiny", "--data", data, "--out", out, *FLAGS).code == 0
    return out


@pytest.fixture
def launch(processes):
    """A function that runs `COMMAND ARGS` as so many ranks and returns their Runs; torchrun's part, which starts the
    processes and keeps the store through which they meet, is done here."""

    def run(command, *args, size=2, **options):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
        texts = [{name: str(value) for name, value in environment.items()} for environment in environments]
        handles = [processes.start(command, *args, env=env, **options) for env in texts]
        return [processes.wait(handle) for handle in handles]

    return run


@pytest.fixture
def train_ranks(launch, data):
    """A function that trains into a folder as `launch` does; a disturbance is a function of this file, by name, that is
    given the rank and prepares the process."""

    def run(out, *flags, disturbance="none", size=2, **options):
        args = ("tiny", "--data", data, "--out", out, *with_flags(*QUICK, *flags))
        return launch("test_ranks.disturbed", disturbance, *args, size=size, **options)

    return run


def with_flags(*flags):
    """FLAGS, as changed by `flags`."""
    words = [*FLAGS, *flags]
    return [word for pair in dict(zip(words[::2], words[1::2], strict=True)).items() for word in pair]


def disturbed(disturbance, *args):
    """`train.py ARGS` in this process, which the function of that name has prepared."""
    ranks_module.STEP_LIMIT = ranks_module.HOST_LIMIT = ranks_module.timedelta(seconds=60)  # not for hours
    globals()[disturbance](launched()[0])
    sys.argv = ["train.py", *args]
    return train.main()


def none(rank):
    """Nothing disturbs."""


class Codes(list):
    """Exit codes of ranks, shown with what the ranks said."""

    def __repr__(self):
        return f"{list(self)}: {self.said}"


def codes(runs):
    found = Codes(run.code for run in runs)
    found.said = "\n".join(run.stderr for run in runs)
    return found


def assert_same_run(out, expected, first=0):
    """The metrics of `out` are those of `expected` from step `first` on, to rounding."""
    records, wanted = ([r for r in metrics(folder) if r["step"] >= first] for folder in (out, expected))
    assert [r["step"] for r in records] == [r["step"] for r in wanted]
    assert [r["tokens"] for r in records] == [r["tokens"] for r in wanted]
    for record, other in zip(records, wanted, strict=True):
        for name in ("loss", "lr", "val_loss", "val_bpb"):
            assert record.get(name, 0) == pytest.approx(other.get(name, 0), abs=2e-5), (record, name)
        assert record.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-3), record


# ---- the numbers


def test_in_bf16_two_processes_with_several_micro_batches_follow_the_run_of_one(train_ranks, data, tmp_path):
    flags = ("--dtype", "bf16", "--max_steps", 20, "--eval_every", 0)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "one", *with_flags(*flags)).code == 0
    assert codes(train_ranks(tmp_path / "two", "--micro_batch_size", 1, *flags)) == [0, 0]
    wanted, found = ([r["loss"] for r in metrics(tmp_path / name)] for name in ("one", "two"))
    assert len(found) == 20
    assert found == pytest.approx(wanted, abs=0.005)


def test_two_processes_train_adapters_as_one_does(train_ranks, data, one, tmp_path):
    flags = ("--init", one, "--lora_rank", 4, "--max_steps", 12, "--eval_every", 0, "--micro_batch_size", 2)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "one", *with_flags(*flags)).code == 0
    assert codes(train_ranks(tmp_path / "two", *flags)) == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_two_processes_under_torchrun_repeat_the_run_of_one_and_only_the_first_is_heard(data, one, tmp_path):
    out = tmp_path / "out"
    done = torchrun("tiny", "--data", data, "--out", out, *FLAGS, "--micro_batch_size", 2)
    assert done.code == 0, done.stderr
    assert_same_run(out, one)
    assert "report.md" in snapshot(out)
    drawn = {"loss.png", "report.md"}  # needs matplotlib; is not written in this process
    assert snapshot(out).keys() - drawn == snapshot(one).keys() - drawn
    lines = done.stderr.splitlines()
    assert sum(line.startswith("info: starting from scratch") for line in lines) == 1
    assert sum(line.startswith(f"step {LENGTH}/{LENGTH}") for line in lines) == 1


def torchrun(*args, size=2, signal_at=None):
    """Runs `torchrun --nproc_per_node SIZE train.py ARGS` and returns its Outcome. Sends SIGTERM to torchrun after the
    line `signal_at` of stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size]
    if "--shutdown-timeout" in get_args_parser()._option_string_actions:  # older versions lack it
        command += ["--shutdown-timeout", "600"]
    command += [ROOT / "train.py", *args, *QUICK]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if signal_at and line.startswith(signal_at):
            process.send_signal(signal.SIGTERM)
    return Outcome(process.wait(), "", "".join(lines))


def test_fault_077_the_last_micro_batch_alone_brings_the_ranks_together_and_nothing_changes(train_ranks, one, tmp_path):
    runs = train_ranks(tmp_path / "out", "--micro_batch_size", 1, disturbance="count_reductions")
    assert codes(runs) == [0, 0]
    assert_same_run(tmp_path / "out", one)
    counted = [int(run.stderr.split("reductions: ")[1]) for run in runs]
    assert counted == [LENGTH + 1] * 2  # one to warm up; the model fits into one bucket


def count_reductions(rank):
    """At the end say on stderr how often gradients were averaged."""
    original, count = torch.nn.parallel.DistributedDataParallel.__init__, [0]

    def counting(group, bucket):
        count[0] += 1
        return allreduce_hook(group, bucket)

    def wrapped(self, *args, **options):
        original(self, *args, **options)
        self.register_comm_hook(None, counting)

    torch.nn.parallel.DistributedDataParallel.__init__ = wrapped
    leave = ranks_module.Ranks.leave

    def tell(self):
        leave(self)
        os.write(2, b"reductions: %d\n" % count[0])

    ranks_module.Ranks.leave = tell


@pytest.mark.parametrize("size", [2, 3])
def test_targets_that_do_not_count_weigh_alike_however_unevenly_the_ranks_have_them(launch, size):
    assert codes(launch("test_ranks.compare_gradients", size=size)) == [0] * size


def compare_gradients():
    """Gradients and loss over a batch, shared by all ranks, are those of one process over all of it."""
    batch = torch.randint(257, (12, 2), generator=torch.Generator().manual_seed(5))
    batch[:5, 1] = IGNORED  # of three ranks the first has no target at all
    with join() as ranks:
        machine = MachineConfig(device="cpu", dtype="fp32", threads=1)
        whole, expected = gradients(batch, Runtime(machine))
        share = 12 // ranks.size
        mine = batch[share * ranks.rank : share * (ranks.rank + 1)]
        found, numbers = gradients(mine, Runtime(machine, ranks))
        torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=0)
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def gradients(batch, run):
    model = tiny_model().train()
    run.ranks.share_gradients(model)
    state = State(model, Recording(model), LossScaler("cpu", False), Progress(micro_batch_size=2))
    numbers = train.train_step(state, batch, 0.0, 0.0, run)
    return list(state.optimizer.gradients.values()), numbers


def test_two_processes_on_examples_follow_the_run_of_one(launch, tmp_path):
    """And a kill in between changes no bit of the run of two."""
    data = make_examples(tmp_path / "data", random_examples(40, longest=70), random_examples(9, seed=1))
    args = ("tiny", "--data", data, *with_flags("--max_steps", 12, "--save_every", 5, "--micro_batch_size", 2))
    assert train_here(*args, "--out", tmp_path / "one").code == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert codes(launch("train.py", *args, *QUICK, "--out", whole)) == [0, 0]
    assert_same_run(whole, tmp_path / "one")
    assert codes(launch("train.py", *args, *QUICK, "--out", killed, kill_step=8)) == [-9, -9]
    assert codes(launch("train.py", *args, *QUICK, "--out", killed)) == [0, 0]
    assert fingerprint(killed, 12) == fingerprint(whole, 12)


@pytest.mark.parametrize("size", [2, 3])
def test_the_validation_loss_is_that_of_one_process_however_many_batches_there_are(launch, data, size):
    assert codes(launch("test_ranks.compare_evaluations", data, size=size)) == [0] * size


def compare_evaluations(data):
    with join() as ranks:
        machine = MachineConfig(device="cpu", dtype="fp32", threads=1)
        model = tiny_model()
        corpus = Corpus(open_dataset(data), "", "size", 32, 8, 1337)
        for eval_tokens, batch_size in ((0, 4), (0, 1), (32, 1), (100, 2), (33, 1)):
            config = SimpleNamespace(rhythm=SimpleNamespace(eval_tokens=eval_tokens))
            state = State(model, None, None, Progress(micro_batch_size=batch_size))
            expected, found = (
                train.evaluate(setup.Run(config, runtime, corpus, None, state, None, None, None, stop=False))
                for runtime in (Runtime(machine), Runtime(machine, ranks))
            )
            assert found == pytest.approx(expected, rel=1e-6), (eval_tokens, batch_size)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_work_that_is_spread_over_the_ranks_gives_what_one_does_alone(launch, count):
    assert codes(launch("test_ranks.compare_spread", count, size=3)) == [0, 0, 0]


def compare_spread(count):
    stack = torch.randn(int(count), 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    done = []

    def square(some):
        done.append(len(some))
        return some * some

    with join() as ranks:
        torch.testing.assert_close(ranks.spread(square, stack), Ranks().spread(square, stack), rtol=0, atol=0)
        assert done[0] == math.ceil(int(count) / ranks.size)


def test_dropout_differs_from_rank_to_rank(train_ranks, tmp_path):
    runs = train_ranks(tmp_path / "out", "--max_steps", 2, "--warmup_steps", 0, disturbance="tell_seeds")
    first, second = ([line for line in run.stderr.splitlines() if line.startswith("seed ")] for run in runs)
    assert len(first) == len(second) == 2
    assert len({*first, *second}) == 4


def tell_seeds(rank):
    original = train.seed_step

    def seed_step(*args):
        original(*args)
        os.write(2, f"seed {torch.initial_seed()}\n".encode())

    train.seed_step = seed_step


# ---- going on with another number of ranks


@pytest.mark.parametrize(
    ("before", "after", "flags"),
    [
        (2, 1, ()),
        (1, 2, ()),
        (2, 3, ("--global_batch_size", 12)),
        (2, 1, ("--optimizer", "muon")),
        (1, 2, ("--optimizer", "muon")),
    ],
    ids=["two_to_one", "one_to_two", "two_to_three", "two_to_one_with_muon", "one_to_two_with_muon"],
)
def test_fault_057_a_run_that_was_killed_goes_on_with_another_number_of_ranks(
    train_ranks, tmp_path, data, one, before, after, flags
):
    out = tmp_path / "out"
    assert set(codes(train_ranks(out, *flags, size=before, kill_step=36))) == {-signal.SIGKILL}
    assert step_names(out)[-1] == "step-000000030"
    runs = train_ranks(out, *flags, size=after)
    assert codes(runs) == [0] * after
    assert f"world_size {before} -> {after}" in runs[0].stderr
    expected = one
    if flags:
        expected = tmp_path / "expected"
        assert train_here("tiny", "--data", data, "--out", expected, *FLAGS, *flags).code == 0
    assert_same_run(out, expected)


def test_fault_055_on_the_same_number_of_ranks_a_killed_run_repeats_to_the_bit(train_ranks, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = ("--dropout", 0.1, "--micro_batch_size", 2)
    assert codes(train_ranks(whole, *flags)) == [0, 0]
    train_ranks(out, *flags, kill_step=36)
    assert codes(train_ranks(out, *flags)) == [0, 0]
    assert fingerprint(out, LENGTH) == fingerprint(whole, LENGTH)


# ---- one writer


def test_only_the_first_rank_writes_and_speaks(train_ranks, tmp_path, one):
    out = tmp_path / "out"
    runs = train_ranks(out, "--sample_every", 25, disturbance="tell_writes")
    assert codes(runs) == [0, 0]
    said = (runs[1].stdout + runs[1].stderr).splitlines()
    assert [line for line in said if not line.startswith("[Gloo] Rank")] == []  # torch 2.10's C++ prints that
    assert "--- sample at step 25" in runs[0].stderr
    writes = [line for line in runs[0].stderr.splitlines() if line.startswith("wrote ")]
    assert any(line.endswith("metrics.jsonl") for line in writes)


def test_lines_of_text_by_the_clock_come_from_the_first_rank_and_change_nothing(train_ranks, tmp_path, one):
    out = tmp_path / "out"
    runs = train_ranks(out, "--sample_every", -1, disturbance="quick_lines")
    assert codes(runs) == [0, 0]
    steps = [line.split()[3].rstrip(",") for line in runs[0].stderr.splitlines() if line.startswith("sample at step")]
    assert steps[0] == "0"
    assert steps[1:] == [str(step) for step in range(10, LENGTH + 1, 10)]  # at evaluations, after the last by the clock
    assert "sample" not in runs[1].stderr + runs[1].stdout
    assert_same_run(out, one)


def quick_lines(rank):
    """The first line comes by the clock, the others at evaluations."""
    budget.SAMPLE_SECONDS = (0,)


def tell_writes(rank):
    """Say on stderr which files below a folder `out` are opened for writing, made or removed."""

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            wrote = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, wrote = args[0] if args else "", event in ("os.mkdir", "os.remove", "os.rename", "os.symlink")
        if wrote and "/out/" in f"{path}/":
            os.write(2, f"wrote {path}\n".encode())

    sys.addaudithook(hook)


def test_the_others_wait_for_what_takes_the_first_rank_longer_than_any_step(train_ranks, tmp_path):
    runs = train_ranks(tmp_path / "out", "--max_steps", 10, "--save_every", 5, disturbance="slow_save")
    assert codes(runs) == [0, 0]
    assert step_names(tmp_path / "out")[-1] == "step-000000010"


def slow_save(rank):
    """Steps may take two seconds; the save after step 5 takes four."""
    ranks_module.STEP_LIMIT = ranks_module.timedelta(seconds=2)
    original = Saver.save

    def save(self, *args, **options):
        time.sleep(4 if self.state.progress.step == 5 else 0)
        original(self, *args, **options)

    Saver.save = save


# ---- one end


def test_fault_075_a_batch_that_does_not_divide_among_the_ranks_is_refused_with_the_nearest_that_do(
    train_ranks, tmp_path
):
    out = tmp_path / "out"
    for flags, said in (
        ((), r"8 must be a multiple of 3 ranks; the nearest that are: [6, 9]"),
        (("--global_batch_size", 12, "--micro_batch_size", 3), "x micro_batch_size 3; the nearest that are: [9, 18]"),
    ):
        runs = train_ranks(out, *flags, size=3)
        assert codes(runs) == [2, 2, 2]
        told = [line for run in runs for line in run.stderr.splitlines()]
        assert len(told) == 1
        assert said in told[0]
    assert not out.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_fault_070_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(
    train_ranks, tmp_path, one, rank
):
    out = tmp_path / "out"
    runs = train_ranks(out, disturbance=f"signal_rank_{rank}")
    assert codes(runs) == [75, 75]
    assert step_names(out)[-1] == "step-000000026"
    assert [("stopped" in run.stderr) for run in runs] == [True, False]
    assert json.loads((out / "exit.json").read_text())["code"] == 75
    assert codes(train_ranks(out)) == [0, 0]
    assert not (out / "exit.json").exists()
    assert_same_run(out, one)


def signal_rank_0(rank):
    at_step(26, lambda: rank == 0 and signal.raise_signal(signal.SIGTERM))


def signal_rank_1(rank):
    at_step(26, lambda: rank == 1 and signal.raise_signal(signal.SIGTERM))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_slot_that_ends_first_stops_all_ranks_after_the_same_step_with_a_checkpoint(
    train_ranks, tmp_path, one, rank
):
    out = tmp_path / "out"
    flags = ("--stop_after_minutes", 60)
    runs = train_ranks(out, *flags, disturbance=f"slot_of_rank_{rank}")
    assert codes(runs) == [75, 75]
    assert step_names(out)[-1] == "step-000000026"
    assert [run.stderr.count("stopped: stop_after_minutes 60 at step 26: ") for run in runs] == [1, 0]
    assert "stop_after_minutes 60 at step 26" in json.loads((out / "exit.json").read_text())["reason"]
    assert codes(train_ranks(out, *flags)) == [0, 0]
    assert_same_run(out, one)


def slot_of_rank_0(rank):
    """The slot of rank 0 alone ends before step 26."""
    at_step(26, lambda: rank == 0 and setattr(Slot, "seconds_left", lambda self: -1.0))


def slot_of_rank_1(rank):
    at_step(26, lambda: rank == 1 and setattr(Slot, "seconds_left", lambda self: -1.0))


def test_where_a_slot_alone_gives_the_length_all_ranks_have_the_learning_rate_of_the_first(train_ranks, tmp_path):
    flags = ("--max_steps", 0, "--stop_after_minutes", 0.05, "--schedule", "linear", "--warmup_steps", 0)
    flags += ("--eval_every", 0, "--save_every", 0)
    runs = train_ranks(tmp_path / "out", *flags, disturbance="later_clock")
    assert codes(runs) == [75, 75]
    rates, others = ([line for line in run.stderr.splitlines() if line.startswith("lr ")] for run in runs)
    assert rates == others
    assert len(set(rates)) > 10  # the rate falls, to a part of the first
    assert float(rates[-1].split()[1]) < 0.3 * float(rates[0].split()[1])


def later_clock(rank):
    """The command begins with the first step; on rank 1, 30 seconds are left for each that is left on rank 0. Says each
    learning rate on stderr."""
    slot_module.command_seconds, slot_module.SAVE_SECONDS = lambda: 0.0, 0.05
    seconds_left, train_step = Slot.seconds_left, train.train_step
    Slot.seconds_left = lambda self: seconds_left(self) * (30 if rank else 1)

    def step(state, batch, lr, *others):
        os.write(2, f"lr {lr}\n".encode())
        return train_step(state, batch, lr, *others)

    train.train_step = step


def at_step(step, action):
    """Do `action` before step number `step` (from 1)."""
    original, left = train.train_step, iter(range(1, step))

    def train_step(*args):
        if next(left, None) is None:
            action()
        return original(*args)

    train.train_step = train_step


def test_fault_071_a_signal_to_one_rank_in_an_evaluation_ends_it_on_all(train_ranks, tmp_path, one):
    out = tmp_path / "out"
    assert codes(train_ranks(out, "--micro_batch_size", 1, disturbance="signal_in_evaluation")) == [75, 75]
    assert step_names(out) == ["step-000000010"]
    assert codes(train_ranks(out, "--micro_batch_size", 1)) == [0, 0]
    assert_same_run(out, one)


def signal_in_evaluation(rank):
    open_windows = Corpus.open_windows

    def opened(corpus, seed):
        open_windows(corpus, seed)
        original = corpus.validation

        def validation(*args):
            for number, batch in enumerate(original(*args)):
                if (rank, number) == (1, 2):
                    signal.raise_signal(signal.SIGTERM)
                assert number < 4, "the evaluation goes on"
                yield batch

        corpus.validation = validation

    Corpus.open_windows = opened


def test_sigterm_to_torchrun_saves_a_checkpoint(data, tmp_path, one):
    out = tmp_path / "out"
    flags = with_flags("--max_steps", 100_000, "--schedule", "constant", "--save_every", 0, "--eval_every", 0)
    done = torchrun("tiny", "--data", data, "--out", out, *flags, signal_at="step 5/")
    assert done.code != 0
    [name] = step_names(out)
    assert json.loads((out / "exit.json").read_text())["code"] == 75
    assert metrics(out)[-1]["step"] == int(name.removeprefix("step-"))


@pytest.mark.parametrize("rank", [0, 1])
def test_fault_068_a_foreseen_error_on_one_rank_ends_all_with_its_code(train_ranks, tmp_path, rank):
    out = tmp_path / "out"
    runs = train_ranks(out, disturbance=f"damage_rank_{rank}")
    assert codes(runs) == [3, 3]
    said = f"shard.bin: damaged by the test on rank {rank}; restore it"
    assert runs[rank].last == f"error: {said}"
    assert "error" not in runs[1 - rank].stderr
    reason = said if rank == 0 else f"rank 1: {said}"
    assert json.loads((out / "exit.json").read_text()) == {"code": 3, "reason": reason}


def damage_rank_0(rank):
    at_step(6, lambda: rank == 0 and damage(rank))


def damage_rank_1(rank):
    at_step(6, lambda: rank == 1 and damage(rank))


def damage(rank):
    raise IntegrityError(f"shard.bin: damaged by the test on rank {rank}; restore it")


def test_fault_068_the_traceback_of_a_bug_on_one_rank_is_the_only_one(train_ranks, tmp_path):
    out = tmp_path / "out"
    runs = train_ranks(out, disturbance="bug")
    assert codes(runs) == [1, 1]
    assert "ZeroDivisionError" in runs[1].last
    assert "Traceback" not in runs[0].stderr
    assert json.loads((out / "exit.json").read_text())["reason"].startswith("rank 1: ZeroDivisionError")


def bug(rank):
    at_step(6, lambda: rank == 1 and 1 / 0)


def test_a_rank_that_is_stuck_when_another_fails_is_ended_and_the_reason_is_recorded(train_ranks, tmp_path):
    out = tmp_path / "out"
    started = time.monotonic()
    runs = train_ranks(out, disturbance="stuck")
    assert codes(runs) == [3, 3]
    assert time.monotonic() - started < 60
    assert json.loads((out / "exit.json").read_text())["reason"].startswith("rank 1: shard.bin")


def stuck(rank):
    """Rank 1 fails and rank 0 never comes to notice."""
    ranks_module.GRACE = 0.5
    at_step(6, lambda: damage(1) if rank == 1 else time.sleep(600))


def test_a_damaged_shard_that_the_first_rank_finds_in_the_background_ends_all(launch, tmp_path):
    folder = make_data(tmp_path / "data")
    shard = folder / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    runs = launch("train.py", "tiny", "--data", folder, "--out", tmp_path / "out", *FLAGS)
    assert codes(runs) == [3, 3]
    assert "sha256 mismatch" in runs[0].last
    assert "sha256 mismatch" in json.loads((tmp_path / "out" / "exit.json").read_text())["reason"]
    assert step_names(tmp_path / "out") == []


def test_fault_028_a_loss_that_is_not_finite_on_one_rank_is_applied_by_none(train_ranks, tmp_path):
    out = tmp_path / "out"
    runs = train_ranks(out, "--save_every", 5, "--eval_every", 0, disturbance="not_a_number")
    assert codes(runs) == [4, 4]
    assert sum("error: non-finite loss or gradient at step 6" in run.stderr for run in runs) == 1
    assert json.loads((out / "exit.json").read_text())["code"] == 4
    assert step_names(out) == ["step-000000005"]


def not_a_number(rank):
    original = GPT.losses
    broken = []
    at_step(6, lambda: broken.append(rank == 1))
    GPT.losses = lambda self, *args: original(self, *args) * (math.nan if any(broken) else 1.0)


def test_fault_074_ranks_that_were_given_different_settings_are_refused(train_ranks, tmp_path):
    runs = train_ranks(tmp_path / "out", disturbance="another_seed")
    assert codes(runs) == [2, 2]
    assert sum("rank 1 disagrees with rank 0 on the settings" in run.stderr for run in runs) == 1
    assert not (tmp_path / "out").exists()


def another_seed(rank):
    original = train.read_settings
    if rank == 1:
        train.read_settings = lambda *args: original(*args[:2], [*args[2], "--seed", "7"], *args[3:])


def test_little_data_shrink_the_batch_to_a_multiple_of_the_ranks(launch, tmp_path):
    data = make_data(tmp_path / "data", train_size=130, val_size=20)  # 5 windows of 21 tokens
    args = ("tiny", "--data", data, "--out", tmp_path / "out", "--max_steps", 2, "--warmup_steps", 0, *QUICK)
    runs = launch("test_ranks.disturbed", "none", *args)
    assert codes(runs) == [0, 0]
    assert "block_size 32 -> 21, global_batch_size 8 -> 4" in runs[0].stderr
    assert state_of(tmp_path / "out", 2)["config"]["global_batch_size"] == 4


def test_fault_074_ranks_with_other_data_shrink_as_rank_0_does_and_are_refused(launch, tmp_path):
    make_data(tmp_path / "data", train_size=130, val_size=20)
    make_data(tmp_path / "data of rank 1", train_size=170, val_size=30)
    args = (
        "tiny",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--max_steps",
        2,
        "--warmup_steps",
        0,
        *QUICK,
    )
    runs = launch("test_ranks.disturbed", "other_data", *args)
    assert codes(runs) == [2, 2]
    assert sum("rank 1 disagrees with rank 0 on the data" in run.stderr for run in runs) == 1
    assert not (tmp_path / "out").exists()


def other_data(rank):
    original = start.open_dataset
    if rank == 1:
        start.open_dataset = lambda folder, *args: original(f"{folder} of rank 1", *args)


def test_one_clock_ends_a_run_by_its_minutes_on_all_ranks(train_ranks, tmp_path):
    flags = ("--max_steps", 0, "--max_minutes", 1.0, "--warmup_steps", 0)
    assert codes(train_ranks(tmp_path / "out", *flags, disturbance="clocks_that_differ")) == [0, 0]
    assert metrics(tmp_path / "out")[-1]["step"] == 6


def clocks_that_differ(rank):
    """A step takes ten seconds of rank 0's clock and twenty of rank 1's."""
    now = iter(range(10**9))

    class Clock:
        def perf_counter(self):
            return 10.0 * (1 + rank) * next(now)

    train.time = Clock()


def test_a_second_run_in_the_same_folder_is_refused_on_all_ranks(train_ranks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        runs = train_ranks(out)
    assert codes(runs) == [5, 5]
    assert sum("in use by" in run.stderr for run in runs) == 1
