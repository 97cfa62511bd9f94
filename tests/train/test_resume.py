"""Resuming: an interrupted run, a branch and an interrupted fine-tune repeat the uninterrupted run to the bit."""

import hashlib
import json
import shutil

import pytest
from training_helpers import (
    EIGHT_STEPS,
    fingerprint,
    make_data,
    metrics,
    run_train,
    sha256,
    snapshot,
    state_of,
    step_names,
    train_here,
)

from gpt.text.corpus import Corpus
from gpt.text.shards import open_dataset

TO_THE_BIT = ("--dropout", "0.1", "--micro_batch_size", "2", "--threads", "2", "--log_every", "1", "--eval_every", "4")


# ---- to the bit


KINDS = [("--dtype", "fp32"), ("--optimizer", "muon", "--dtype", "bf16")]


@pytest.mark.parametrize("kind", KINDS, ids=("adamw-fp32", "muon-bf16"))
def test_fault_055_056_two_kills_at_and_after_an_epochs_end_change_no_bit(kind, processes, tmp_path):
    data = make_data(tmp_path / "data", train_size=1980)
    corpus = Corpus(open_dataset(data), "", "size", 32, 8, 1337)
    assert corpus.training.per_epoch == 64  # eight steps
    corpus.close()
    settings = ("tiny", "--data", data, "--max_steps", "20", "--save_every", "8", *TO_THE_BIT, *kind)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = processes.run("train.py", *settings, "--out", killed, kill_step=10)
    second = processes.run("train.py", *settings, "--out", killed, kill_step=7)
    last = processes.run("train.py", *settings, "--out", killed)
    reference = processes.run("train.py", *settings, "--out", whole)
    assert (first.code, second.code, last.code, reference.code) == (-9, -9, 0, 0), last.stderr
    assert f"continuing {killed}/step-000000008 at step 8" in second.stderr
    assert f"continuing {killed}/step-000000012 at step 12" in last.stderr
    assert "warning" not in second.stderr + last.stderr
    assert fingerprint(killed, 20) == fingerprint(whole, 20)
    ours, theirs = state_of(killed, 20)["progress"], state_of(whole, 20)["progress"]
    assert {**ours, "train_seconds": 0} == {**theirs, "train_seconds": 0}
    assert ours["windows_seen"] == 160


def test_fault_055_a_killed_run_with_kernels_goes_on_with_them_to_the_bit(processes, kernels_cache, tmp_path):
    data = make_data(tmp_path / "data", train_size=1980)
    settings = ("tiny", "--data", data, "--max_steps", "12", "--save_every", "8", "--dropout", "0", "--dtype", "bf16")
    settings += ("--micro_batch_size", "2", "--threads", "2", "--log_every", "1", "--eval_every", "4")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    here = {"XDG_CACHE_HOME": kernels_cache}
    first = processes.run("train.py", *settings, "--out", killed, "--kernels", "on", kill_step=10, env=here)
    last = processes.run("train.py", *settings, "--out", killed, env=here)  # auto: as the run began
    reference = processes.run("train.py", *settings, "--out", whole, "--kernels", "on", env=here)
    assert (first.code, last.code, reference.code) == (-9, 0, 0), last.stderr
    assert "C++ kernels" in last.stderr
    assert "warning" not in last.stderr
    assert state_of(killed, 12)["runtime"]["kernels"]
    assert fingerprint(killed, 12) == fingerprint(whole, 12)
    plain = tmp_path / "plain"
    assert processes.run("train.py", *settings, "--out", plain, "--kernels", "off", env=here).code == 0
    assert fingerprint(plain, 12)["weights"] != fingerprint(whole, 12)["weights"]  # they did take part


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=("adamw-fp32", "muon-bf16"))
def test_fault_055_compiled_runs_repeat_to_the_bit_too(kind, tmp_path):
    data = make_data(tmp_path / "data", train_size=1980)
    settings = (*TO_THE_BIT, *kind, "--compile", "on", "--save_every", "4", "--max_steps", "12")
    whole = run_train("tiny", "--data", data, "--out", tmp_path / "whole", *settings, timeout=600)
    assert whole.code == 0, whole.stderr
    half = tmp_path / "whole/step-000000008"
    second = run_train("--resume", half, "--out", tmp_path / "second", *settings, timeout=600)
    assert second.code == 0, second.stderr
    assert state_of(tmp_path / "second", 12)["runtime"]["compile"]
    ours, theirs = fingerprint(tmp_path / "second", 12), fingerprint(tmp_path / "whole", 12)
    assert (ours["weights"], ours["optimizer"]) == (theirs["weights"], theirs["optimizer"])
    assert ours["log"] == theirs["log"][8:]


# ---- runs of one data folder


def test_fault_065_best_loss_and_metrics_continue_without_a_repeated_step(run, again):
    before = metrics(run)
    beyond = [{"step": step, "loss": 1.0} for step in (9, 10)]  # logged by a run killed before it saved them
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in beyond) + '{"step": 11, "lo')
    done = again("--max_steps", "12")
    assert done.code == 0
    steps = [record["step"] for record in metrics(run)]
    assert steps == list(range(1, 13))
    assert metrics(run)[: len(before)] == before
    progress = state_of(run, 12)["progress"]
    losses = {record["step"]: record["val_loss"] for record in metrics(run) if "val_loss" in record}
    best = min((step for step in losses if step), key=losses.get)
    assert (progress["best_step"], progress["best_loss"]) == (best, losses[best])
    assert (run / "best.txt").read_text() == f"step-{best:09d}\n"


def test_an_older_step_branches_off_into_a_new_folder_and_repeats_the_run(run, made, tmp_path):
    before = snapshot(run)
    done = train_here("--resume", run / "step-000000004", "--out", tmp_path / "branch")
    assert done.code == 0, done.stderr
    branch, original = fingerprint(tmp_path / "branch", 8), fingerprint(made / "run", 8)
    assert (branch["weights"], branch["optimizer"]) == (original["weights"], original["optimizer"])
    assert branch["log"] == original["log"][4:]
    assert snapshot(run) == before
    again = train_here("--resume", run / "step-000000004", "--out", tmp_path / "branch")
    assert (again.code, again.stdout) == (0, "nothing to do: step 8 of 8\n")


def test_resume_by_the_latest_link_continues_the_run(run):
    done = train_here("--resume", run / "latest", "--max_steps", "9")
    assert done.code == 0, done.stderr
    assert step_names(run)[-1] == "step-000000009"


# ---- fine-tuning


def test_fault_082_a_fine_tune_starts_anew_records_its_base_and_leaves_it_alone(run, made, tmp_path):
    before = snapshot(run)
    out = tmp_path / "tuned"
    done = train_here("tiny", "--init", run, "--data", made / "data", "--out", out, *EIGHT_STEPS, "--lr", "1e-5")
    assert done.code == 0, done.stderr
    assert snapshot(run) == before
    state = state_of(out, 8)
    base = run / (run / "best.txt").read_text().strip()
    digest = hashlib.sha256(sha256(base / "model.safetensors").encode()).hexdigest()
    assert state["base"] == {"init": str(run), "model": str(base), "sha256": digest}
    assert (state["progress"]["step"], state["progress"]["windows_seen"]) == (8, 64)
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(9))
    trained = next(r["val_loss"] for r in metrics(run) if r["step"] == int(base.name[5:]))
    assert records[0]["val_loss"] == pytest.approx(trained, abs=1e-5)  # the base's weights, not new ones


def test_a_preempted_fine_tune_continues_by_the_same_command(run, made, processes, tmp_path):
    command = ("tiny", "--init", run, "--data", made / "data", *EIGHT_STEPS, "--dropout", "0.1")
    first = processes.run("train.py", *command, "--out", tmp_path / "killed", kill_step=7)
    done = train_here(*command, "--out", tmp_path / "killed")
    assert (first.code, done.code) == (-9, 0), done.stderr
    assert "at step 4" in done.stderr
    assert train_here(*command, "--out", tmp_path / "whole").code == 0
    assert fingerprint(tmp_path / "killed", 8) == fingerprint(tmp_path / "whole", 8)
    assert state_of(tmp_path / "killed", 8)["base"] == state_of(tmp_path / "whole", 8)["base"]


def test_a_fine_tune_continues_by_either_command_also_when_its_base_is_gone(run, made, tmp_path):
    base, out = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(run, base, symlinks=True)
    common = ("--data", made / "data", "--out", out)
    assert train_here("tiny", "--init", base, *common, *EIGHT_STEPS).code == 0
    done = train_here("--resume", out, "--max_steps", 60)
    assert done.code == 0, done.stderr
    assert "setting changed" not in done.stderr
    assert f'init = "{base}"' in (out / "config.toml").read_text()
    shutil.rmtree(base)
    done = train_here("tiny", "--init", base, *common, "--max_steps", 62, *EIGHT_STEPS[2:])
    assert done.code == 0, done.stderr
    assert step_names(out)[-1] == "step-000000062"
