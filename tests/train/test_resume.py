"""Resuming and fine-tuning: an interrupted run repeats the uninterrupted one to the bit, and refuses what would not."""

import hashlib
import json
import shutil

import pytest
import torch
from training_helpers import (
    fingerprint,
    make_data,
    metrics,
    run_train,
    sha256,
    snapshot,
    step_names,
    train_here,
)

from gpt.checkpoint.read import find_model_folder, load_pretrained, verify_checkpoint
from gpt.text.corpus import Corpus
from gpt.text.tokenizer import train_bpe
from gpt.train.start import load_base

TO_THE_BIT = ("--dropout", "0.1", "--micro_batch_size", "2", "--threads", "2", "--log_every", "1", "--eval_every", "4")
SHORT = ("--max_steps", "8", "--eval_every", "4", "--save_every", "4", "--log_every", "1", "--keep_last", "9")


def state_of(out, step):
    return json.loads((out / f"step-{step:09d}/training/state.json").read_text())


# ---- to the bit


KINDS = [("--dtype", "fp32"), ("--optimizer", "muon", "--dtype", "bf16")]


@pytest.mark.parametrize("kind", KINDS, ids=("adamw-fp32", "muon-bf16"))
def test_fault_055_056_two_kills_at_and_after_an_epochs_end_change_no_bit(kind, processes, tmp_path):
    data = make_data(tmp_path / "data", train_size=1980)
    corpus = Corpus(str(data), "", "size", 32, 8, 1337)
    assert corpus.windows.per_epoch == 64  # eight steps
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
    assert "C++ attention" in last.stderr
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `data` and a finished run `run` of eight steps, checkpoints at 4 and 8; not to be changed."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder / "data", train_size=2000)
    done = train_here("tiny", "--data", folder / "data", "--out", folder / "run", *SHORT)
    assert done.code == 0, done.stderr
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of that run."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def again(made, run):
    """`again(*flags)` gives the run's own command once more, with flags that come last or instead."""

    def command(*flags, data=made / "data", out=run):
        kept = [
            w for flag, value in zip(SHORT[::2], SHORT[1::2], strict=True) if flag not in flags for w in (flag, value)
        ]
        return train_here("tiny", "--data", data, "--out", out, *kept, *flags)

    return command


def test_fault_061_a_finished_run_changes_no_file(run, again):
    before = snapshot(run)
    done = again()
    assert (done.code, done.stdout) == (0, "nothing to do: step 8 of 8\n")
    assert snapshot(run) == before


def test_fault_060_resume_of_a_path_without_checkpoint_is_exit_2_and_auto_starts_from_scratch(made, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path / "absent/step-000000008"):
        done = train_here("tiny", "--data", made / "data", "--resume", path)
        assert done.code == 2
        assert done.last.startswith(f"error: {path}: no valid checkpoint; ")
        assert not (tmp_path / "absent").exists()
    done = train_here("tiny", "--data", made / "data", "--out", tmp_path / "new", *SHORT)
    assert (done.code, "info: starting from scratch" in done.stderr) == (0, True)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_fault_058_without_trainer_state_resume_is_exit_3_and_init_takes_the_weights(name, made, run, tmp_path):
    step = run / "step-000000008"
    (step / "training" / name).unlink()
    done = train_here("--resume", step)
    assert done.code == 3
    assert f"training/{name}: missing" in done.last
    shutil.rmtree(step / "training")
    done = train_here("tiny", "--init", step, "--data", made / "data", "--out", tmp_path / "new", *SHORT)
    assert done.code == 0, done.stderr


def test_fault_058_a_checkpoint_of_weights_alone_cannot_be_resumed(made, tmp_path):
    settings = ("--max_steps", "8", "--save_every", "2", "--keep_last", "3", "--eval_every", "0")
    assert train_here("tiny", "--data", made / "data", "--out", tmp_path / "run", *settings).code == 0
    kept = tmp_path / "run/step-000000004"
    assert not verify_checkpoint(kept, training=False).state
    done = train_here("--resume", kept)
    assert done.code == 3
    assert done.last.startswith(f"error: {kept}: holds weights only") and f"--init {kept}" in done.last


@pytest.mark.parametrize("flags", [("--n_layer", "3"), ("--n_head", "4"), ("--n_embd", "64"), ("--block_size", "16")])
@pytest.mark.parametrize("by", ["auto", "path"])
def test_fault_059_another_architecture_is_exit_2_by_name(flags, by, run, again):
    before = snapshot(run)
    done = again(*flags, *(("--resume", run) if by == "path" else ()), "--max_steps", "9")
    assert done.code == 2
    assert f"another architecture ({flags[0][2:]} " in done.last and f"-> {flags[1]})" in done.last
    assert snapshot(run) == before


def test_fault_059_another_tokenizer_is_exit_2_naming_both(run, again, tmp_path):
    tokenizer = train_bpe(["the sea was calm and a gull cried once " * 20], 270)
    data = make_data(tmp_path / "other", train_size=4000, val_size=2000, tokenizer=tokenizer)
    done = again("--max_steps", "9", data=data)
    assert done.code == 2
    assert "tokenizers differ" in done.last and "byte" in done.last and "bpe:270" in done.last


OTHER = ("--lr", "2e-2", "--weight_decay", "0.2", "--dropout", "0.2", "--global_batch_size", "4")


def test_fault_059_other_settings_are_refused_by_auto_which_lists_them(run, again):
    before = snapshot(run)
    done = again(*OTHER, "--max_steps", "9")
    assert done.code == 2
    for text in ("lr 0.01 -> 0.02", "weight_decay 0.1 -> 0.2", "dropout 0.0 -> 0.2", "global_batch_size 8 -> 4"):
        assert text in done.last
    assert f"--resume {run}" in done.last
    assert snapshot(run) == before


def test_fault_059_other_settings_are_accepted_by_path_and_logged(run):
    done = train_here("--resume", run, *OTHER, "--max_steps", "9")
    assert done.code == 0, done.stderr
    assert "info: setting changed on resume: lr 0.01 -> 0.02" in done.stderr
    state = state_of(run, 9)
    assert (state["config"]["lr"], state["config"]["global_batch_size"]) == (0.02, 4)
    assert state["progress"]["windows_seen"] == 8 * 8 + 4  # the cursor counts sequences


@pytest.mark.parametrize("by", ["auto", "path"])
def test_another_optimizer_is_exit_2_because_it_finds_no_state(by, run, again):
    flags = ("--optimizer", "muon") if by == "auto" else ("--optimizer", "muon", "--resume", run)
    done = again(*flags)
    assert done.code == 2
    assert "made with optimizer adamw, not muon" in done.last


def test_fault_059_length_rhythm_and_hardware_may_change(run, again):
    done = again("--max_steps", "10", "--eval_every", "5", "--save_every", "3", "--log_every", "2", "--verify", "size")
    assert done.code == 0, done.stderr
    assert "setting changed" not in done.stderr
    assert step_names(run)[-1] == "step-000000010"


def test_fault_063_another_machine_setting_is_one_warning(run, again):
    done = again("--max_steps", "9", "--threads", "2", "--micro_batch_size", "4")
    assert done.code == 0
    [warning] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "not bitwise" in warning and "threads 1 -> 2" in warning and "micro_batch_size 8 -> 4" in warning


def test_fault_063_another_torch_is_a_warning(run, again, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    done = again("--max_steps", "9")
    assert done.code == 0
    assert "torch " in done.stderr and "-> 9.9.9" in done.stderr


@pytest.mark.parametrize("by", ["auto", "path"])
def test_fault_064_another_seed_is_exit_2(by, run, again):
    before = snapshot(run)
    done = again("--seed", "7", "--max_steps", "9", *(("--resume", run) if by == "path" else ()))
    assert done.code == 2
    assert "another seed (seed 1337 -> 7)" in done.last
    assert snapshot(run) == before


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


def test_fault_026_changed_data_is_exit_3_and_accepted_by_path(made, run, again, tmp_path):
    other = make_data(tmp_path / "other", train_size=2000, seed=5)
    before = snapshot(run)
    done = again("--max_steps", "9", data=other)
    assert done.code == 3
    assert done.last.startswith("error: dataset changed since checkpoint: train_000000.bin")
    assert snapshot(run) == before
    done = again("--max_steps", "9", "--resume", run, data=other)
    assert done.code == 0, done.stderr
    assert "warning: dataset changed since checkpoint: train_000000.bin" in done.stderr


def test_the_same_data_in_another_place_is_the_same_data(made, run, again, tmp_path):
    shutil.copytree(made / "data", tmp_path / "moved")
    assert again("--max_steps", "9", data=tmp_path / "moved").code == 0


def test_an_older_step_is_not_resumed_in_its_own_folder(run):
    before = snapshot(run)
    done = train_here("--resume", run / "step-000000004")
    assert done.code == 2
    assert "holds step 8, newer than step-000000004" in done.last and "--out NEW" in done.last
    assert snapshot(run) == before


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


def test_resume_off_does_not_write_into_a_folder_with_checkpoints(run, again):
    before = snapshot(run)
    done = again("--resume", "")
    assert done.code == 2
    assert "--resume is off" in done.last
    assert snapshot(run) == before


# ---- fine-tuning


@pytest.mark.parametrize("where", [".", "best", "step-000000008", "step-000000004"])
def test_fault_081_out_may_not_be_the_base_models_run_folder(where, run, made):
    before = snapshot(run)
    done = train_here("tiny", "--init", run / where, "--data", made / "data", "--out", run, *SHORT)
    assert done.code == 2
    assert done.last.startswith(f"error: {run}: out holds the base checkpoint; ")
    assert snapshot(run) == before


def test_fault_081_out_may_not_be_a_plain_base_folder_either(run, made, tmp_path):
    shutil.move(run / "step-000000008", tmp_path / "base")
    before = snapshot(tmp_path / "base")
    done = train_here("tiny", "--init", tmp_path / "base", "--data", made / "data", "--out", tmp_path / "base", *SHORT)
    assert done.code == 2
    assert "out holds the base checkpoint" in done.last
    assert snapshot(tmp_path / "base") == before


def test_fault_082_a_fine_tune_starts_anew_records_its_base_and_leaves_it_alone(run, made, tmp_path):
    before = snapshot(run)
    out = tmp_path / "tuned"
    done = train_here("tiny", "--init", run, "--data", made / "data", "--out", out, *SHORT, "--lr", "1e-5")
    assert done.code == 0, done.stderr
    assert snapshot(run) == before
    state = state_of(out, 8)
    base = run / (run / "best.txt").read_text().strip()
    digest = hashlib.sha256(sha256(base / "model.safetensors").encode()).hexdigest()
    assert state["base"] == {"init": str(run), "sha256": digest}
    assert (state["progress"]["step"], state["progress"]["windows_seen"]) == (8, 64)
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(9))
    trained = next(r["val_loss"] for r in metrics(run) if r["step"] == int(base.name[5:]))
    assert records[0]["val_loss"] == pytest.approx(trained, abs=1e-5)  # the base's weights, not new ones


def test_a_preempted_fine_tune_continues_by_the_same_command(run, made, processes, tmp_path):
    command = ("tiny", "--init", run, "--data", made / "data", *SHORT, "--dropout", "0.1")
    first = processes.run("train.py", *command, "--out", tmp_path / "killed", kill_step=7)
    done = train_here(*command, "--out", tmp_path / "killed")
    assert (first.code, done.code) == (-9, 0), done.stderr
    assert "at step 4" in done.stderr
    assert train_here(*command, "--out", tmp_path / "whole").code == 0
    assert fingerprint(tmp_path / "killed", 8) == fingerprint(tmp_path / "whole", 8)
    assert state_of(tmp_path / "killed", 8)["base"] == state_of(tmp_path / "whole", 8)["base"]


def test_fault_079_a_shorter_context_is_cropped_and_said_and_a_longer_one_refused(run, made, tmp_path):
    command = ("tiny", "--init", run, "--data", made / "data", "--out", tmp_path / "tuned", *SHORT)
    done = train_here(*command, "--block_size", "33")
    assert done.code == 2
    assert "block_size 33 is above the base model's 32" in done.last
    assert not (tmp_path / "tuned").exists()
    done = train_here(*command, "--block_size", "16")
    assert done.code == 0, done.stderr
    assert done.stderr.count("context cropped from 32 to 16") == 1
    tuned, tokenizer, _ = load_pretrained(tmp_path / "tuned")
    assert (tuned.config.block_size, tuned.position.weight.shape) == (16, (16, 32))
    base, _, _ = load_pretrained(run)
    cropped, _ = load_base(find_model_folder(run), str(run), 16, tokenizer)
    assert torch.equal(cropped.position.weight, base.position.weight[:16])
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(cropped.eval()(ids), base.eval()(ids))


def test_fault_079_a_base_with_another_tokenizer_is_exit_2(run, tmp_path):
    tokenizer = train_bpe(["the sea was calm and a gull cried once " * 20], 270)
    data = make_data(tmp_path / "other", train_size=4000, val_size=2000, tokenizer=tokenizer)
    done = train_here("tiny", "--init", run, "--data", data, "--out", tmp_path / "tuned", *SHORT)
    assert done.code == 2
    assert "tokenizers differ" in done.last
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("flags", [("--n_layer", "3"), ("--n_head", "4"), ("--n_embd", "64")])
def test_a_given_setting_that_contradicts_the_base_model_is_exit_2(flags, run, made, tmp_path):
    done = train_here("tiny", "--init", run, "--data", made / "data", "--out", tmp_path / "tuned", *SHORT, *flags)
    assert done.code == 2
    assert f"{flags[0][2:]} {flags[1]} disagrees with the base model's" in done.last


def test_a_base_that_a_preset_names_gives_the_architecture_too(run, made, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text(f'init = "{run}"\nmax_steps = 1\neval_every = 0\n')
    assert train_here(preset, "--data", made / "data", "--out", tmp_path / "a", "--global_batch_size", 4).code == 0
    assert load_pretrained(tmp_path / "a")[0].config.block_size == load_pretrained(run)[0].config.block_size
    preset.write_text(f'init = "{run}"\nmax_steps = 1\nn_layer = 7\n')
    done = train_here(preset, "--data", made / "data", "--out", tmp_path / "b")
    assert done.code == 2
    assert "n_layer 7 disagrees with the base model's" in done.last


def test_a_branch_into_a_folder_of_another_run_must_agree_with_that_run(run, made, tmp_path):
    other = tmp_path / "other"
    command = ("--data", made / "data", "--out", other, *SHORT)
    assert train_here("tiny", *command, "--lr", "0.005").code == 0
    done = train_here("--resume", run, "--data", made / "data", "--out", other)
    assert done.code == 2
    assert "made with other settings" in done.last or "another architecture" in done.last


def test_a_fine_tune_continues_by_either_command_also_when_its_base_is_gone(run, made, tmp_path):
    base, out = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(run, base, symlinks=True)
    common = ("--data", made / "data", "--out", out)
    assert train_here("tiny", "--init", base, *common, *SHORT).code == 0
    done = train_here("--resume", out, "--max_steps", 60)
    assert done.code == 0, done.stderr
    assert "setting changed" not in done.stderr
    assert f'init = "{base}"' in (out / "config.toml").read_text()
    shutil.rmtree(base)
    done = train_here("tiny", "--init", base, *common, "--max_steps", 62, *SHORT[2:])
    assert done.code == 0, done.stderr
    assert step_names(out)[-1] == "step-000000062"
