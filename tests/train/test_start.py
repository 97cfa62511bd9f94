"""Where a run starts: what may be resumed with which settings, what a fine-tune may start from, and refusals."""

import json
import shlex
import shutil
from pathlib import Path

import foreign_helpers
import prepare
import pytest
import torch
from prepare_helpers import prepare_here
from training_helpers import EIGHT_STEPS, in_process, make_data, save_step, snapshot, state_of, step_names, train_here

from gpt.checkpoint.read import find_model_folder, load_pretrained, open_model, verify_checkpoint
from gpt.checkpoint.weights import StoredModel
from gpt.model import ModelConfig
from gpt.text.corpus import Corpus
from gpt.text.shards import open_dataset
from gpt.text.tokenizer import load_tokenizer, train_bpe
from gpt.train import start
from gpt.train.budget import LIMITS
from gpt.train.start import load_base, tokenizer_source

STORED = ("config", "generation_config", "tokenizer_config")  # files of a step folder
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>", "mask_token": "<mask>"}


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
    done = train_here("tiny", "--data", made / "data", "--out", tmp_path / "new", *EIGHT_STEPS)
    assert (done.code, "info: starting from scratch" in done.stderr) == (0, True)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_fault_058_without_trainer_state_resume_is_exit_3_and_init_takes_the_weights(name, made, run, tmp_path):
    step = run / "step-000000008"
    (step / "training" / name).unlink()
    done = train_here("--resume", step)
    assert done.code == 3
    assert f"training/{name}: missing" in done.last
    shutil.rmtree(step / "training")
    done = train_here("tiny", "--init", step, "--data", made / "data", "--out", tmp_path / "new", *EIGHT_STEPS)
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


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--max_steps", "12"), "max_steps 8 -> 12"),
        (("--max_steps", "0", "--max_tokens", "4000"), "max_steps 8 -> 0, max_tokens 0 -> 4000"),
        (("--max_steps", "12", "--log_every", "2"), "max_steps 8 -> 12"),
        (("--max_steps", "12", "--stop_after_minutes", "60"), "max_steps 8 -> 12"),
    ],
)
def test_another_length_on_resume_says_that_the_learning_rate_begins_a_new_schedule(run, again, flags, told):
    done = again(*flags)
    assert done.code == 0, done.stderr
    assert f"info: length changed on resume ({told}): the learning rate begins a new schedule\n" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--log_every", "2"), ("--patience", "9"), ("--stop_after_minutes", "60")])
def test_the_same_length_on_resume_says_nothing_of_the_schedule(run, again, flags):
    assert "schedule" not in again(*flags).stderr


def test_a_slot_alone_in_place_of_another_limit_is_another_length(capsys):
    old = {"max_steps": 8, "stop_after_minutes": 5.0, "schedule": "cosine"}  # a checkpoint without the other limits
    new = dict.fromkeys(LIMITS, 0) | old
    start.tell_new_length(old, new | {"stop_after_minutes": 9.0})
    assert capsys.readouterr().err == ""
    start.tell_new_length(old, new | {"max_steps": 0})
    assert "(max_steps 8 -> 0)" in capsys.readouterr().err
    start.tell_new_length(old | {"max_steps": 0}, new | {"max_steps": 0, "stop_after_minutes": 9.0})
    assert "(stop_after_minutes 5.0 -> 9.0)" in capsys.readouterr().err


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


def test_fault_026_changed_data_is_exit_3_and_accepted_by_path(made, run, again, tmp_path):
    other = make_data(tmp_path / "other", train_size=2000, seed=5)
    before = snapshot(run)
    done = again("--max_steps", "9", data=other)
    assert done.code == 3
    assert done.last.startswith("error: dataset changed since checkpoint: train_000000.bin")
    assert f"--init {run} and a new --out" in done.last
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


def test_resume_off_does_not_write_into_a_folder_with_checkpoints(run, again):
    before = snapshot(run)
    done = again("--resume", "")
    assert done.code == 2
    assert "--resume is off" in done.last
    assert snapshot(run) == before


@pytest.mark.parametrize("where", [".", "best", "step-000000008", "step-000000004"])
def test_fault_081_out_may_not_be_the_base_models_run_folder(where, run, made):
    before = snapshot(run)
    done = train_here("tiny", "--init", run / where, "--data", made / "data", "--out", run, *EIGHT_STEPS)
    assert done.code == 2
    assert done.last.startswith(f"error: {run}: out holds the base checkpoint; ")
    assert snapshot(run) == before


def test_fault_081_out_may_not_be_a_plain_base_folder_either(run, made, tmp_path):
    shutil.move(run / "step-000000008", tmp_path / "base")
    before = snapshot(tmp_path / "base")
    done = train_here(
        "tiny", "--init", tmp_path / "base", "--data", made / "data", "--out", tmp_path / "base", *EIGHT_STEPS
    )
    assert done.code == 2
    assert "out holds the base checkpoint" in done.last
    assert snapshot(tmp_path / "base") == before


def test_fault_079_a_shorter_context_is_cropped_and_said_and_a_longer_one_refused(run, made, tmp_path):
    command = ("tiny", "--init", run, "--data", made / "data", "--out", tmp_path / "tuned", *EIGHT_STEPS)
    done = train_here(*command, "--block_size", "33")
    assert done.code == 2
    assert "block_size 33 is above the base model's 32" in done.last
    assert not (tmp_path / "tuned").exists()
    done = train_here(*command, "--block_size", "16")
    assert done.code == 0, done.stderr
    assert done.stderr.count("context cropped from 32 to 16") == 1
    tuned, _, _ = load_pretrained(tmp_path / "tuned")
    corpus = Corpus(open_dataset(made / "data"), "", "size", 16, 8, 1)
    assert (tuned.config.block_size, tuned.position.weight.shape) == (16, (16, 32))
    base, _, _ = load_pretrained(run)
    cropped, _, _ = load_base(open_model(find_model_folder(run)), str(run), 16, corpus)
    corpus.close()
    assert torch.equal(cropped.position.weight, base.position.weight[:16])
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(cropped.eval()(ids), base.eval()(ids))


def test_fault_079_a_base_with_another_tokenizer_is_exit_2(run, tmp_path):
    tokenizer = train_bpe(["the sea was calm and a gull cried once " * 20], 270)
    data = make_data(tmp_path / "other", train_size=4000, val_size=2000, tokenizer=tokenizer)
    done = train_here("tiny", "--init", run, "--data", data, "--out", tmp_path / "tuned", *EIGHT_STEPS)
    assert done.code == 2
    assert "tokenizers differ" in done.last
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("flags", [("--n_layer", "3"), ("--n_head", "4"), ("--n_embd", "64")])
def test_a_given_setting_that_contradicts_the_base_model_is_exit_2(flags, run, made, tmp_path):
    done = train_here("tiny", "--init", run, "--data", made / "data", "--out", tmp_path / "tuned", *EIGHT_STEPS, *flags)
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
    command = ("--data", made / "data", "--out", other, *EIGHT_STEPS)
    assert train_here("tiny", *command, "--lr", "0.005").code == 0
    done = train_here("--resume", run, "--data", made / "data", "--out", other)
    assert done.code == 2
    assert "made with other settings" in done.last or "another architecture" in done.last


@pytest.mark.parametrize("flags", [("--n_layer", 10**6), ("--n_embd", 2**31)])
def test_fault_101_an_impossible_size_is_refused_with_its_bytes_before_any_allocation(
    made, tmp_path, monkeypatch, flags
):
    monkeypatch.setattr(start, "GPT", None)
    run = train_here("tiny", "--data", made / "data", "--out", tmp_path / "out", *flags)
    assert run.code == 2
    assert str(flags[1]) in run.last
    assert "bytes" in run.last
    assert not (tmp_path / "out").exists()


def test_resuming_a_path_with_the_weights_of_another_model_is_refused(run, made, tmp_path):
    done = train_here("--resume", run, "--init", save_step(tmp_path / "other", 1), "--max_steps", "9")
    assert done.code == 2
    assert "this run began with init ''; leave out --init" in done.last


def test_an_empty_init_takes_the_base_out_of_a_preset(made, run, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text(f'init = "{run}"\nmax_steps = 1\neval_every = 0\n')
    settings = ("--init", "", "--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8")
    done = train_here(preset, "--data", made / "data", "--out", tmp_path / "out", *settings, "--global_batch_size", "4")
    assert done.code == 0, done.stderr
    assert load_pretrained(tmp_path / "out")[0].config.n_layer == 1


def test_a_fine_tune_continues_by_its_own_config_file_when_its_base_is_gone(made, run, tmp_path):
    base, out = tmp_path / "base", tmp_path / "tuned"
    run.rename(base)
    common = ("--data", made / "data", "--out", out, *EIGHT_STEPS)
    assert train_here("tiny", "--init", base, *common).code == 0
    shutil.rmtree(base)
    done = train_here(out / "config.toml", "--max_steps", "9")
    assert done.code == 0, done.stderr
    assert step_names(out)[-1] == "step-000000009"


@pytest.mark.parametrize("flags", [("--dropout", "0.1"), ("--n_embd", "30")])
def test_kernels_that_a_model_cannot_use_are_refused_before_anything_is_made(flags, made, tmp_path):
    settings = ("--kernels", "on", "--dtype", "bf16", *EIGHT_STEPS, *flags)
    done = train_here("tiny", "--data", made / "data", "--out", tmp_path / "out", *settings)
    needs = "in bf16 the C++ needs dropout 0 and heads of an even width (n_embd / n_head)"
    assert (done.code, done.last) == (2, f"error: kernels on: {needs}; use auto")
    assert not (tmp_path / "out").exists()


# ---- little text


TINY = ("tiny", "--warmup_steps", "0")


def lines_of(done, words):
    return [line for line in done.stderr.splitlines() if words in line]


@pytest.fixture
def little(tmp_path):
    """Data of 153 training and 22 validation tokens; the preset tiny asks for a context of 32 and a batch of 8."""
    return make_data(tmp_path / "little", train_size=150, val_size=20)


@pytest.fixture
def train_on(little, tmp_path):
    """Returns train_here for the preset tiny on the little data, into the folder `out`."""
    return lambda *flags, out="out": train_here(*TINY, "--data", little, "--out", tmp_path / out, *flags)


def test_context_and_batch_shrink_to_the_data_and_one_line_says_so(train_on, little, tmp_path):
    done = train_on("--max_steps", "2")
    assert done.code == 0, done.stderr
    [line] = lines_of(done, "->")
    size = "153 training and 22 validation tokens"
    assert line == f"info: {little}: little text ({size}): block_size 32 -> 21, global_batch_size 8 -> 6"
    state = state_of(tmp_path / "out", 2)
    assert (state["config"]["block_size"], state["config"]["global_batch_size"]) == (21, 6)
    assert state["asked"] == {"block_size": 32, "global_batch_size": 8}
    assert load_pretrained(tmp_path / "out")[0].config.block_size == 21
    repeated = train_here(tmp_path / "out/config.toml", "--out", tmp_path / "new")
    assert repeated.code == 0 and not lines_of(repeated, "->")
    assert (
        snapshot(tmp_path / "new")["step-000000002/model.safetensors"][0]
        == (snapshot(tmp_path / "out")["step-000000002/model.safetensors"][0])
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--block_size", "32"), "val has 22 tokens; needs at least 33 (block_size+1)"),
        (("--global_batch_size", "8"), "6 windows of 21 tokens, global_batch_size is 8"),
        (("--block_size", "16", "--global_batch_size", "9"), "8 windows of 16 tokens, global_batch_size is 9"),
    ],
)
def test_fault_024_025_settings_that_are_typed_do_not_shrink(flags, message, train_on, tmp_path):
    done = train_on(*flags)
    assert done.code == 2
    assert message in done.last
    assert not (tmp_path / "out").exists()


def test_what_is_not_typed_shrinks_beside_what_is(train_on):
    done = train_on("--block_size", "18", "--max_steps", "1")
    assert (done.code, len(lines_of(done, "global_batch_size 8 -> 7"))) == (0, 1)
    done = train_on("--global_batch_size", "4", "--max_steps", "1", out="other")
    assert (done.code, len(lines_of(done, "block_size 32 -> 21"))) == (0, 1)
    assert not lines_of(done, "global_batch_size")


def test_a_batch_of_micro_batches_stays_a_multiple_of_them(train_on, tmp_path):
    done = train_on("--micro_batch_size", "4", "--max_steps", "1")
    assert done.code == 0, done.stderr
    assert state_of(tmp_path / "out", 1)["config"]["global_batch_size"] == 4


def test_data_too_short_for_any_context_are_refused(tmp_path):
    data = make_data(tmp_path / "data", train_size=150, val_size=6)  # 7 tokens: a context of 6
    done = train_here("tiny", "--data", data, "--out", tmp_path / "out")
    assert done.code == 2
    assert "val has 7 tokens; needs at least 33 (block_size+1)" in done.last
    assert not lines_of(done, "->")


@pytest.mark.parametrize("by", ["auto", "path"])
def test_a_run_keeps_the_context_and_batch_that_it_began_with(by, train_on, tmp_path):
    assert train_on("--max_steps", "2").code == 0
    run = ("--resume", tmp_path / "out") if by == "path" else ()
    assert train_here(*run, "--max_steps", "3").code == 0 if run else True
    done = train_on("--max_steps", "4", *run)
    assert done.code == 0, done.stderr
    assert len(lines_of(done, "block_size 32 -> 21, global_batch_size 8 -> 6")) == 1
    assert state_of(tmp_path / "out", 4)["asked"] == {"block_size": 32, "global_batch_size": 8}


def test_a_run_keeps_them_though_the_data_have_grown(train_on, little, tmp_path):
    assert train_on("--max_steps", "2").code == 0
    make_data(little, train_size=3000, val_size=500)
    assert train_on("--max_steps", "3").code == 3  # the dataset changed
    done = train_on("--max_steps", "3", "--resume", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert state_of(tmp_path / "out", 3)["config"]["block_size"] == 21
    done = train_on("--max_steps", "4", "--resume", tmp_path / "out", "--block_size", "32")
    assert done.code == 2 and "another architecture (block_size 21 -> 32)" in done.last


def test_a_fine_tunes_context_shrinks_to_the_data(run, little, tmp_path):
    command = (*TINY, "--init", run, "--data", little, "--out", tmp_path / "tuned", "--max_steps", "1")
    done = train_here(*command)
    assert done.code == 0, done.stderr
    assert len(lines_of(done, "block_size 32 -> 21, global_batch_size 8 -> 6")) == 1
    assert load_pretrained(tmp_path / "tuned")[0].position.weight.shape[0] == 21
    shutil.rmtree(run)
    assert train_here(*command[:-1], "2").code == 0


def test_fault_023_the_refusal_gives_the_command_that_prepares_the_same_text(run, tmp_path):
    source, data = tmp_path / "it's a text.txt", tmp_path / "data"
    source.write_text("the sea was calm and a gull cried once " * 50)
    prepare_here(data, source, tokenizer="bpe:270", val_fraction=0.3)
    command = (*TINY, "--init", run, "--out", tmp_path / "tuned", "--max_steps", "1")
    done = train_here(*command, "--data", data)
    assert done.code == 2
    helps = done.last.partition("python data/prepare.py ")[2]
    assert in_process(prepare.main, "prepare.py", *shlex.split(helps)).code == 0
    done = train_here(*command, "--data", f"{data}-{run.name}")
    assert done.code == 0, done.stderr
    for folder in (data, Path(f"{data}-{run.name}")):
        source_entry = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["source"]
        assert source_entry["recipe"] == [str(source), "--val_fraction", "0.3"]


@pytest.mark.parametrize(
    ("init", "files", "expected"),
    [
        ("gpt2", ["vocab.json"], "gpt2"),
        ("gpt2-medium", ["vocab.json"], "FOLDER"),
        ("org/name", ["tokenizer.json"], "FOLDER"),
        ("gpt2-medium", [], "byte"),
        ("FOLDER", ["tokenizer.json"], "FOLDER"),
    ],
)
def test_a_bases_tokenizer_is_named_so_that_prepare_finds_it(init, files, expected, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    base = StoredModel(tmp_path, ModelConfig(), 257, [], tmp_path, dict)
    named = tokenizer_source(init.replace("FOLDER", str(tmp_path)), base, load_tokenizer("byte"))
    assert named == expected.replace("FOLDER", str(tmp_path))


def test_a_fine_tune_keeps_every_eos_and_the_roles_of_its_base_and_so_does_a_continued_run(tmp_path):
    foreign_helpers.all_roles(tmp_path / "base")
    foreign_helpers.edit(tmp_path / "base", "generation_config.json", lambda values: values.update(eos_token_id=[1, 9]))
    tokenizer = load_tokenizer(tmp_path / "base")
    data = make_data(tmp_path / "data", tokenizer=tokenizer)
    settings = ("finetune", "--init", tmp_path / "base", "--data", data, "--out", tmp_path / "out", "--save_every", "2")
    settings += ("--warmup_steps", "1", "--global_batch_size", "2", "--device", "cpu", "--block_size", "32")
    for steps in (2, 4):
        done = train_here(*settings, "--max_steps", steps)
        assert done.code == 0, done.stderr
        folder = tmp_path / f"out/step-{steps:09d}"
        stored = {name: json.loads((folder / f"{name}.json").read_text()) for name in STORED}
        assert stored["generation_config"]["eos_token_id"] == [1, 9]
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 300}
        assert {name: stored["config"][name] for name in ids} == ids
        assert {name: stored["tokenizer_config"][name] for name in ROLES} == ROLES
        _, saved, _ = load_pretrained(folder)
        assert saved.stops == (1, 9)
