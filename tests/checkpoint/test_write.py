"""Step folders as they are written: whole or not at all, and models for transformers and CTranslate2."""

import json
import os
import stat

import pytest
import torch
from checkpoint_helpers import (
    MIXED,
    SIZES,
    assert_same_outputs,
    load_theirs,
    load_transformers,
    released_size,
    save,
)
from safetensors.torch import load_file, save_file
from training_helpers import continue_run, make_data, optimizer_of, save_step, snapshot, tiny_model, train_here

from gpt.checkpoint.read import OPTIMIZER, STATE, Checkpoint, load_pretrained, verify_checkpoint
from gpt.checkpoint.write import save_checkpoint
from gpt.errors import IntegrityError, NonFiniteError, ResourceError
from gpt.model import GPT
from gpt.text.tokenizer import load_tokenizer, train_bpe
from gpt.train.state import load_optimizer, optimizer_tensors

# ---- whole or not at all


def test_fault_041_a_disk_that_is_full_anywhere_harms_no_other_checkpoint_and_leaves_nothing_behind(tmp_path):
    resource = pytest.importorskip("resource")
    folder = save_step(tmp_path, 1)
    before, limits = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, (folder / "training/optimizer.safetensors").stat().st_size, 4000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(
                ResourceError, match=r"step-000000002: writing failed: .* \(needs .* GB, .* GB free\); "
            ):
                save_step(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert snapshot(tmp_path) == before


def test_fault_042_all_is_flushed_before_the_folder_gets_its_name_and_the_run_folder_after(tmp_path, monkeypatch):
    flushed, rename, fsync = [], os.rename, os.fsync

    def note_fsync(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source, target):
        flushed.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder = save_step(tmp_path, 1)
    place = flushed.index("rename")
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= set(flushed[:place])
    assert flushed[place + 1 :] == [tmp_path.stat().st_ino]


def test_fault_047_a_step_whose_partial_folder_exists_is_saved_again(run):
    partial = run / "step-000000010.tmp"
    (partial / "training").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    damaged = run / "step-000000009"
    damaged.mkdir()
    done = continue_run(run, "--max_steps", "10", "--save_every", "1", "--eval_every", "0", "--keep_last", "9")
    assert done.code == 0, done.stderr
    assert {verify_checkpoint(run / f"step-{n:09d}").step for n in (9, 10)} == {9, 10}
    assert not list(run.glob("*.tmp"))


def test_fault_053_a_save_needs_no_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert verify_checkpoint(save_step(tmp_path / "run", 1)).step == 1


def test_fault_117_other_users_cannot_write_to_a_checkpoints_files(tmp_path):
    before = os.umask(0)
    try:
        folder = save_step(tmp_path, 1)
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o022 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_050_weights_that_are_not_finite_are_not_saved(bad, byte, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc.bias[3] = bad
    with pytest.raises(NonFiniteError, match=r"non-finite values in transformer\.h\.1\.mlp\.c_fc\.bias at step 1"):
        save(model, byte, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fault_049_no_wrappers_prefix_reaches_the_disk(byte, tmp_path):
    model = tiny_model()
    model.compile()
    folder = save(model, byte, tmp_path)
    assert all(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))


def test_a_step_folders_root_holds_only_hugging_face_files_in_normal_modes(byte, tmp_path):
    folder = save_step(tmp_path, 1)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert files == {"config.json", "model.safetensors", "generation_config.json", *tokenizer_files}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"training"}
    (tmp_path / "plain").touch()
    config = json.loads((folder / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32  # llama.cpp's converter reads the first
    normal = stat.S_IMODE((tmp_path / "plain").stat().st_mode) & ~0o022
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {normal}


# ---- read by others


@pytest.mark.parametrize("name", SIZES)
def test_transformers_computes_our_logits_from_our_step_folder(name, byte, tmp_path):
    ours = GPT(released_size(name), byte.vocab_size)
    assert_same_outputs(ours, load_theirs(save(ours, byte, tmp_path)), byte.vocab_size)


@pytest.mark.parametrize("name", ["byte", "bpe", "gpt2"])
def test_auto_tokenizer_reads_the_same_ids_from_our_step_folder(name, tmp_path, request):
    if name == "gpt2":
        request.getfixturevalue("bpe_cache")
    texts = [MIXED * 20, "the cat sat on the mat " * 50]
    tokenizer = train_bpe(texts, 300) if name == "bpe" else load_tokenizer(name)
    folder = save_step(tmp_path, 1, tiny_model(tokenizer.vocab_size), tokenizer)
    theirs = load_transformers().AutoTokenizer.from_pretrained(folder)
    assert theirs(MIXED)["input_ids"] == tokenizer.encode(MIXED, allow_special=True)
    assert theirs.decode(tokenizer.encode(MIXED)) == MIXED
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eot
    assert theirs.model_max_length == 32


def test_the_names_in_our_weight_file_are_those_of_transformers(byte, tmp_path):
    folder = save_step(tmp_path, 1)
    stored = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    config = load_transformers().AutoConfig.from_pretrained(folder)
    theirs = load_transformers().GPT2LMHeadModel(config).state_dict()
    theirs.pop("lm_head.weight")
    assert stored == {name: tuple(value.shape) for name, value in theirs.items()}


def test_a_run_folders_best_link_is_a_model_for_transformers(tmp_path):
    data = make_data(tmp_path / "data", train_size=2000)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "run", "--max_steps", "6").code == 0
    model, tokenizer, _ = load_pretrained(tmp_path / "run/best")
    assert_same_outputs(model, load_theirs(tmp_path / "run/best"), 257)
    theirs = load_transformers().AutoTokenizer.from_pretrained(tmp_path / "run/best")
    assert theirs(MIXED)["input_ids"] == tokenizer.encode(MIXED, allow_special=True)
    by_run = load_pretrained(tmp_path / "run")[0]
    assert torch.equal(by_run.token.weight, model.token.weight)


def test_the_generation_settings_we_store_are_ours_in_transformers_words(byte, tmp_path):
    folder = save_step(tmp_path, 1)
    settings = load_transformers().GenerationConfig.from_pretrained(folder)
    settings.validate(strict=True)
    assert settings.do_sample and (settings.temperature, settings.top_p, settings.top_k) == (0.8, 0.95, 0)
    assert settings.eos_token_id == settings.pad_token_id == byte.eot
    text = load_theirs(folder).generate(torch.tensor([[5, 6]]), max_new_tokens=3, generation_config=settings)
    assert text.shape[0] == 1
    assert text.shape[1] in (3, 4, 5)


def test_ctranslate2_converts_our_step_folder_and_chooses_our_tokens(byte, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = tiny_model(n_layer=2, n_embd=32, block_size=64, seed=3).eval()
    folder = save_step(tmp_path, 1, model)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    ids = byte.encode("once the sea")
    tokens = load_transformers().AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    [result] = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32").generate_batch(
        [tokens], max_length=8, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    expected = []
    with torch.no_grad():
        while len(expected) < 8:
            expected.append(int(model(torch.tensor([ids + expected])).argmax()))
    assert result.sequences_ids[0] == expected


# ---- the optimizer's state


def test_the_optimizers_state_comes_back_bit_for_bit_without_the_padding(tmp_path):
    model = tiny_model()
    optimizer = optimizer_of(model)
    files = {OPTIMIZER: optimizer_tensors(model, optimizer), STATE: {"progress": {}}}
    folder = save_checkpoint(tmp_path, 1, model, load_tokenizer("byte"), files, {}, {"dataset": {}})
    assert load_file(folder / "training/optimizer.safetensors")["exp_avg.token.weight"].shape == (257, 16)
    loaded, _, _ = load_pretrained(folder)
    other = optimizer_of(loaded, seed=9)
    load_optimizer(other, loaded, verify_checkpoint(folder))
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            kept = value[:257] if value.shape == (320, 16) else value
            assert torch.equal(other.state[theirs][key][: len(kept)] if kept.dim() else other.state[theirs][key], kept)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("exp_avg.ln_f.bias"), r"exp_avg\.ln_f\.bias is missing"),
        (lambda v: v.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda v: v.update({"exp_avg.ln_f.bias": torch.zeros(15)}),
            r"exp_avg\.ln_f\.bias is \(15,\), model wants \(16,\)",
        ),
        (lambda v: v.update({"step.ln_f.bias": torch.zeros(2)}), r"step\.ln_f\.bias is \(2,\), model wants \(\)"),
        (lambda v: v.update({"exp_avg.ln_f.bias": torch.tensor(0.0)}), r"exp_avg\.ln_f\.bias is \(\), model wants"),
    ],
)
def test_fault_049_an_optimizer_state_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    model = tiny_model()
    folder = save_step(tmp_path, 1, model)
    values = load_file(folder / "training/optimizer.safetensors")
    change(values)
    save_file(values, folder / "training/optimizer.safetensors")
    unchecked = Checkpoint(folder, 1, {}, {})
    with pytest.raises(IntegrityError, match=message):
        load_optimizer(optimizer_of(model), model, unchecked)
