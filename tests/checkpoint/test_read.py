"""Checkpoints that are damaged or hostile: refused by name, the newest good one is found, no pickle is ever run."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import FILES, Canary, assert_same_outputs, flip_a_bit, save, theirs_of
from foreign_helpers import write
from paths import ROOT
from safetensors.torch import load_file, save_file
from training_helpers import (
    continue_run,
    in_process,
    make_data,
    metrics,
    rewrite_manifest,
    save_step,
    snapshot,
    step_names,
    train_here,
)

import sample
from gpt.checkpoint import read
from gpt.checkpoint.read import find_model_folder, load_pretrained, newest_checkpoint, verify_checkpoint
from gpt.errors import InputError, IntegrityError
from gpt.text.tokenizer import load_tokenizer, train_bpe
from gpt.train.saver import apply_retention, drop_trainer_state, point

# ---- damage


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def take_away(path):
    path.unlink()


def swap(path):
    """Put the file of an earlier step in its place; where that has the same content, a byte of it is other."""
    other = Path(str(path).replace("step-000000008", "step-000000006"))
    same = other.read_bytes() == path.read_bytes()
    path.write_bytes(other.read_bytes() + (b" " if same else b""))


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, take_away, swap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_fault_043_044_a_damaged_checkpoint_is_passed_over_by_name(damage, name, run, capsys):
    damage(run / "step-000000008" / name)
    found = newest_checkpoint(run)
    assert found.step == 6
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith("warning: ")
    assert "step-000000008" in warning and warning.endswith("; trying step-000000006")
    with pytest.raises(IntegrityError, match="step-000000008"):
        verify_checkpoint(run / "step-000000008")


def test_fault_043_every_bit_of_the_manifest_counts(run):
    path = run / "step-000000008/training/manifest.json"
    content = path.read_bytes()
    places = random.Random(0).sample(range(8 * len(content)), 300)
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            verify_checkpoint(path.parents[1])


def test_fault_043_a_run_goes_on_from_the_newest_valid_checkpoint_and_says_so(run, run_folder):
    flip_a_bit(run / "step-000000008/model.safetensors")
    done = continue_run(run, "--max_steps", "8", "--save_every", "2", "--keep_last", "4", "--eval_every", "0")
    assert done.code == 0
    expected = "step-000000008/model.safetensors: sha256 mismatch; trying step-000000006"
    assert re.search(f"warning: .*{expected}", done.stderr)
    assert load_file(run / "step-000000008/model.safetensors").keys()
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        again, before = run / "step-000000008" / name, run_folder / "step-000000008" / name
        assert again.read_bytes() == before.read_bytes()
    assert [record["step"] for record in metrics(run)] == [record["step"] for record in metrics(run_folder)]


@pytest.mark.parametrize("command", ["resume", "sample"])
def test_fault_043_an_explicit_path_to_a_damaged_checkpoint_is_exit_3(command, run):
    flip_a_bit(run / "step-000000008/model.safetensors")
    path = run / "step-000000008"
    if command == "resume":
        done = train_here("--resume", path)
    else:
        done = in_process(sample.main, "sample.py", path, "--prompt", "a")
    assert done.code == 3
    assert done.last.startswith(f"error: {path}/model.safetensors: sha256 mismatch; ")


def test_fault_043_checkpoints_that_are_all_damaged_are_exit_3_and_never_a_silent_restart(run):
    for folder in run.glob("step-*"):
        take_away(folder / "model.safetensors")
    before = snapshot(run)
    done = continue_run(run, "--max_steps", "9")
    assert done.code == 3
    assert done.last.startswith(f"error: {run}: none of 4 checkpoints can be used; ")
    assert done.stderr.count("warning: ") == 4
    assert snapshot(run) == before
    assert in_process(sample.main, "sample.py", run, "--prompt", "a").code == 3


def test_fault_044_a_step_folder_under_another_steps_name_is_refused(run):
    (run / "step-000000008").rename(run / "step-000000123")
    with pytest.raises(IntegrityError, match="its manifest is of step 8"):
        verify_checkpoint(run / "step-000000123")
    shutil.copytree(run / "step-000000123", run / "mine")  # a name that claims no step
    assert verify_checkpoint(run / "mine").step == 8


POINTERS = {
    "missing": None,
    "empty": b"",
    "nowhere": b"step-000000777\n",
    "outside": b"../../etc\n",
    "noise": b"\xff\xfe",
}


@pytest.mark.parametrize("content", POINTERS.values(), ids=POINTERS)
def test_fault_045_a_bad_latest_txt_is_a_warning_and_the_newest_is_found(content, run, capsys):
    (run / "latest.txt").unlink()
    if content is not None:
        (run / "latest.txt").write_bytes(content)
    assert newest_checkpoint(run).step == 8
    assert re.search(r"warning: .*latest\.txt names no checkpoint; looking at all", capsys.readouterr().err)


def test_fault_045_a_bad_best_txt_gives_the_newest(run):
    (run / "best.txt").write_text("/etc\n")
    assert find_model_folder(run).name == "step-000000008"


def test_a_damaged_best_checkpoint_gives_the_newest_with_a_warning(run, capsys):
    point(run, "best", run / "step-000000004")
    assert find_model_folder(run).name == "step-000000004"
    cut(run / "step-000000004/config.json")
    assert find_model_folder(run).name == "step-000000008"
    assert "trying step-000000008" in capsys.readouterr().err


def test_a_damaged_best_checkpoints_weights_are_never_handed_out(run, capsys):
    point(run, "best", run / "step-000000004")
    path = run / "step-000000004/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # a weight: the file can still be read
    path.write_bytes(content)
    model, _, _ = load_pretrained(run)
    newest, best = (load_pretrained(without_manifest(run / f"step-00000000{n}"))[0] for n in (8, 4))
    assert same_weights(model, newest) and not same_weights(model, best)
    assert "step-000000004/model.safetensors: sha256 mismatch; trying step-000000008" in capsys.readouterr().err


def without_manifest(folder):
    """A copy of the Hugging Face part of a step folder, which is read without being verified."""
    return shutil.copytree(folder, folder.parents[1] / folder.name, ignore=shutil.ignore_patterns("training"))


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in FILES if name != "training/optimizer.safetensors"])
def test_fault_043_nothing_is_loaded_from_a_folder_in_which_a_bit_is_flipped(name, run):
    folder = run / "step-000000008"
    flip_a_bit(folder / name)
    with pytest.raises(IntegrityError, match=f"{name}: (sha256 mismatch|not valid JSON|not a checkpoint)|format"):
        load_pretrained(folder)


def test_the_optimizers_state_is_hashed_where_it_is_read_and_only_measured_where_it_is_not(run):
    folder = run / "step-000000008"
    flip_a_bit(folder / "training/optimizer.safetensors")
    load_pretrained(folder)
    with pytest.raises(IntegrityError, match=r"optimizer\.safetensors: sha256 mismatch"):
        verify_checkpoint(folder)
    (folder / "training/optimizer.safetensors").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match=r"optimizer\.safetensors: 3 bytes"):
        load_pretrained(folder)


def test_a_damaged_file_is_said_to_be_damaged_whatever_reading_it_runs_into(run):
    folder = run / "step-000000008"
    values = load_file(folder / "model.safetensors")
    values["transformer.ln_f.bias"] += float("nan")
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256 mismatch"):
        load_pretrained(folder)
    with pytest.raises(IntegrityError, match=r"non-finite values in ln_f\.bias"):
        load_pretrained(without_manifest(folder))


def test_fault_048_a_newer_format_is_refused_with_both_numbers(run):
    rewrite_manifest(run / "step-000000008", format_version=3)
    with pytest.raises(IntegrityError, match="checkpoint format 3, this program reads up to 1"):
        verify_checkpoint(run / "step-000000008")


@pytest.mark.parametrize("name", ["/etc/hostname", "../../x", "a/../../x", "a\\b", "a\x00b", "", "C:x"])
def test_fault_108_a_name_in_the_manifest_may_not_leave_the_folder(name, run):
    folder = run / "step-000000008"
    rewrite_manifest(folder, files={name: {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(IntegrityError, match="manifest path leaves"):
        verify_checkpoint(folder)
    assert in_process(sample.main, "sample.py", folder, "--prompt", "a").code == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"format_version": 1}', "[" * 100000, "\ud800"])
def test_a_malformed_manifest_is_an_integrity_error(content, run):
    path = run / "step-000000008/training/manifest.json"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(IntegrityError, match="step-000000008"):
        verify_checkpoint(path.parents[1])


@pytest.mark.parametrize("values", [{"format_version": "1"}, {"format_version": 0}, {"step": None}, {"files": None}])
def test_a_manifest_with_other_values_is_not_called_a_newer_one(values, run):
    rewrite_manifest(run / "step-000000008", **values)
    with pytest.raises(IntegrityError, match=r"manifest\.json: not a checkpoint manifest"):
        verify_checkpoint(run / "step-000000008")
    (run / "step-000000008/training/manifest.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"manifest\.json: not a checkpoint manifest"):
        verify_checkpoint(run / "step-000000008")


@pytest.mark.parametrize("files", [[], {"config.json": 3}, {"config.json": {}}])
def test_a_manifest_with_entries_of_another_kind_is_an_integrity_error(files, run):
    rewrite_manifest(run / "step-000000008", files=files)
    with pytest.raises(IntegrityError):
        verify_checkpoint(run / "step-000000008")


# ---- loading


def test_loading_leaves_torchs_number_of_threads_alone_even_two_at_once(run_folder, one_thread):
    torch.set_num_threads(3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_pretrained, [run_folder / "step-000000008"] * 4))
    load_pretrained(run_folder / "step-000000008")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("verifies", [True, False])
def test_the_type_of_the_weights_may_be_a_function_of_the_models_shape(run, verifies):
    folder = run / "step-000000008"
    folder, asked = folder if verifies else without_manifest(folder), []
    threads = torch.get_num_threads()

    def choose(*shape):
        asked.append((*shape, torch.get_num_threads()))
        return torch.bfloat16

    model, _, _ = load_pretrained(folder, choose)
    assert model.dtype == torch.bfloat16
    assert asked == [(model.config, model.vocab_size, threads)]


@pytest.mark.parametrize("change", [{"n_embd": 1 << 40}, {"n_positions": 1 << 40}, {"n_head": 0}, {"n_layer": "x"}])
def test_the_type_of_the_weights_is_not_asked_for_a_model_that_the_files_do_not_hold(run, change):
    """To measure a model of such a width would take all memory, before the damage is found."""
    folder, asked = without_manifest(run / "step-000000008"), []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((InputError, IntegrityError)):
        load_pretrained(folder, lambda *shape: asked.append(shape) or torch.float32)
    assert not asked


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions import sympy for a tensor on the meta device")
def test_loading_a_model_does_not_import_the_compiler(run_folder):
    code = "import sys; from gpt.checkpoint.read import load_pretrained as load; load(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, run_folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "gpt.checkpoint.read" in loaded
    assert not loaded & {"sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes"}


def test_a_vocabulary_padded_beyond_the_tokenizer_is_cropped(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path, vocab_size=320)
    ours, tokenizer, _ = load_pretrained(tmp_path)
    assert ours.vocab_size == tokenizer.vocab_size == 257
    assert_same_outputs(ours, theirs, 257)
    again = save(ours, tokenizer, tmp_path / "run")
    assert load_file(again / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(byte, tmp_path):
    theirs_of(byte, tmp_path, vocab_size=200, bos_token_id=0, eos_token_id=0)
    with pytest.raises(IntegrityError, match="the tokenizer has 257 ids, the model 200; they do not belong together"):
        load_pretrained(tmp_path)


def test_vocab_json_and_merges_txt_do_instead_of_tokenizer_json(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat " * 50], 265)
    theirs_of(tokenizer, tmp_path)
    model = json.loads(tokenizer.huggingface_files[0])["model"]
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "old")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]), encoding="utf-8")
    assert load_pretrained(tmp_path)[1].identity == tokenizer.identity


def test_weights_of_gpt2s_vocabulary_without_any_tokenizer_get_gpt2s(bpe_cache, tmp_path, capsys):
    gpt2 = load_tokenizer("gpt2")
    theirs_of(gpt2, tmp_path, vocab_size=50304, n_embd=8)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    model, tokenizer, _ = load_pretrained(tmp_path)
    assert (tokenizer.identity, model.vocab_size) == (gpt2.identity, 50257)
    assert "assuming gpt2's" in capsys.readouterr().err


# ---- hostile files


@pytest.fixture
def payload(tmp_path):
    """(bytes of a pickle that creates the canary, and of the same as torch.save writes it; path of the canary)."""
    canary = tmp_path / "canary"
    torch.save({"model": Canary(canary)}, tmp_path / "saved.pt")
    yield pickle.dumps(Canary(canary)), (tmp_path / "saved.pt").read_bytes()
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists()  # it would have worked


@pytest.mark.parametrize("kind", [0, 1], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", FILES)
def test_fault_103_a_pickle_in_place_of_a_checkpoints_file_is_not_run(name, kind, payload, run):
    path = run / "step-000000008" / name
    path.write_bytes(payload[kind])
    assert in_process(sample.main, "sample.py", path.parents[name.count("/")], "--prompt", "a").code == 3
    assert train_here("--resume", run / "step-000000008").code == 3


@pytest.mark.parametrize("name", [n for n in FILES if "/" not in n])
def test_fault_103_a_pickle_in_a_hugging_face_folder_is_not_run(name, payload, run):
    folder = run / "step-000000008"
    shutil.rmtree(folder / "training")
    (folder / name).write_bytes(payload[1])
    done = in_process(sample.main, "sample.py", folder, "--prompt", "a")
    assert done.code == 3
    assert name in done.last


def test_fault_103_a_pickle_named_model_safetensors_is_said_to_be_no_safetensors_file(payload, run):
    folder = run / "step-000000008"
    shutil.rmtree(folder / "training")
    for content in payload:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"model\.safetensors: not a safetensors file"):
            load_pretrained(folder)


def folder_of_pickles(name, content, folder, byte):
    """Writes a folder of a model whose weights are the pickle `content`: transformers', nanoGPT's or an adapter."""
    theirs_of(byte, folder / "base")
    if name == "ckpt.pt":
        folder = folder / "nano"
    elif name == "adapter_model.bin":
        settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base")}
        folder = folder / "adapter"
        write(folder, adapter_config=settings)
    else:
        folder = folder / "base"
        (folder / "model.safetensors").unlink()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", [0, 1], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "adapter_model.bin"])
def test_fault_103_a_payload_in_pickled_weights_is_not_run(name, kind, payload, byte, tmp_path):
    folder = folder_of_pickles(name, payload[kind], tmp_path / "model", byte)
    data = make_data(tmp_path / "data", train_size=2000)
    before = snapshot(folder)
    for done in (
        in_process(sample.main, "sample.py", folder, "--prompt", "a"),
        train_here("tiny", "--data", data, "--init", folder, "--out", tmp_path / "out"),
    ):
        assert done.code == 3
        assert ["not a file of tensors as torch.save writes it", "its pickle wants to call"][kind] in done.last
        assert done.last.startswith(f"error: {folder / name}: ")
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert snapshot(folder) == before


def test_fault_103_a_pickle_of_other_things_is_no_checkpoint(byte, tmp_path):
    folder = folder_of_pickles("ckpt.pt", b"", tmp_path / "model", byte)
    torch.save({"model": {}}, folder / "ckpt.pt")
    with pytest.raises(InputError, match="not a checkpoint of nanoGPT, which has model and model_args"):
        load_pretrained(folder)
    folder = folder_of_pickles("pytorch_model.bin", b"", tmp_path / "other", byte)
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin: holds other things than tensors by name"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json", "tokenizer_config.json", "train_000000.bin"])
def test_fault_103_a_pickle_in_place_of_a_data_file_is_not_run(name, payload, tmp_path):
    data = make_data(tmp_path / "data", train_size=2000)
    (data / name).write_bytes(payload[0])
    done = train_here("tiny", "--data", data, "--out", tmp_path / "run")
    assert done.code == 3
    assert name in done.last
    assert not (tmp_path / "run").exists()


def test_fault_103_a_pickle_in_npy_shards_is_not_run(payload, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.npy").write_bytes(payload[0])
    settings = ("--out", tmp_path / "run", "--tokenizer", "byte")
    assert train_here("tiny", "--data", data, *settings).code == 3
    np.save(data / "train.npy", np.array([Canary(tmp_path / "canary")], dtype=object), allow_pickle=True)
    assert train_here("tiny", "--data", data, *settings).code == 3


# ---- a run that deletes what is being read


def while_reading(monkeypatch, name, *actions):
    """Makes the first calls of read.`name` do one of `actions` each before they begin."""
    original, left = getattr(read, name), list(actions)

    def function(*args, **options):
        if left:
            left.pop(0)()
        return original(*args, **options)

    monkeypatch.setattr(read, name, function)


def train_on(run, step):
    """Does to a run what training does at its next save: another step folder, new pointers, old ones deleted."""
    save_step(run, step)
    point(run, "latest", run / f"step-{step:09d}")
    point(run, "best", run / f"step-{step:09d}")
    apply_retention(run, step, keep_last=1, keep_every=0)


@pytest.mark.parametrize("name", ["read_manifest", "check_file", "load_folder", "load_model"])
@pytest.mark.parametrize("use", [load_pretrained, find_model_folder, newest_checkpoint])
def test_fault_128_a_reader_of_a_run_reads_the_pointer_again_when_its_folder_is_deleted(
    name, use, run, monkeypatch, capsys
):
    point(run, "best", run / "step-000000004")
    while_reading(monkeypatch, name, lambda: train_on(run, 10), lambda: None, lambda: train_on(run, 12))
    assert use(run)
    assert "missing" not in capsys.readouterr().err
    if name != "check_file" and use == load_pretrained:
        assert step_names(run)[-1] in ("step-000000010", "step-000000012")


def test_fault_128_a_link_is_followed_again_when_what_it_led_to_is_deleted(run, monkeypatch, capsys):
    while_reading(monkeypatch, "read_manifest", lambda: train_on(run, 10))
    load_pretrained(run / "latest")
    assert capsys.readouterr().err == ""
    assert step_names(run) == ["step-000000010"]


def test_fault_128_a_reader_while_the_trainer_state_of_its_folder_is_dropped_reads_the_manifest_again(
    run, monkeypatch, capsys
):
    folder = run / "step-000000004"
    while_reading(monkeypatch, "check_file", lambda: drop_trainer_state(folder))
    load_pretrained(folder)
    assert capsys.readouterr().err == ""


def test_fault_128_a_folder_that_changes_at_every_reading_is_an_error_in_the_end(run, monkeypatch):
    readings = []

    def damage(*_args, **_options):
        readings.append(True)
        os.utime(run / "step-000000004/training/manifest.json", ns=(len(readings), len(readings)))
        raise IntegrityError("x: damaged; y")

    monkeypatch.setattr(read, "load_verified", damage)
    with pytest.raises(IntegrityError, match="damaged"):
        load_pretrained(run / "step-000000004")
    assert len(readings) == read.MOST_READINGS


def test_fault_128_a_step_folder_that_is_named_and_deleted_is_exit_2(run, monkeypatch):
    folder = run / "step-000000004"
    while_reading(monkeypatch, "read_manifest", lambda: shutil.rmtree(folder))
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_pretrained(folder)
