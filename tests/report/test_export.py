"""Exported folders: what is in them, what transformers makes of them, and what is refused."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from adapter_helpers import save_adapter
from checkpoint_helpers import FILES, change_weights, load_theirs, load_transformers, save, theirs_of
from nanogpt_helpers import save_nanogpt
from prepare_helpers import prepare_here
from safetensors.torch import load_file
from training_helpers import in_process, make_data, tiny_model, train_here

from gpt.checkpoint.read import load_pretrained
from gpt.config import explanations, fields
from gpt.generate.generator import TextGenerator
from gpt.report import export
from gpt.report.export import ExportConfig
from gpt.text.examples import chat_template
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

BYTE = load_tokenizer("byte")
EXPORTED = {"README.md", *(name for name in FILES if "/" not in name)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_here(*args):
    return in_process(export.main, "export", *args)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    root = tmp_path_factory.mktemp("export")
    data = make_data(root / "data", train_size=2000)
    done = train_here(
        "tiny", "--data", data, "--out", root / "run", "--max_steps", 2, "--eval_every", 2, "--warmup_steps", 0
    )
    assert done.code == 0, done.stderr
    return root / "run"


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("dtype", TYPES)
def test_the_folder_holds_the_rounded_weights_of_the_best_step_and_nothing_for_training(run, tmp_path, dtype):
    target = tmp_path / "new/model"
    done = export_here(run, target, "--dtype", dtype, "--license", "mit")
    assert done.code == 0, done.stderr
    assert names(target) == EXPORTED
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    source = run / (run / "best.txt").read_text().strip()
    stored, exported = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert stored.keys() == exported.keys()
    assert all(torch.equal(exported[name], value.to(TYPES[dtype])) for name, value in stored.items())
    theirs = load_transformers().AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert theirs.dtype == TYPES[dtype]  # by config.json
    card = (target / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: mit\n" in card and "\n# model\n" in card and "after 2 steps" in card
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert (target / "README.md").stat().st_mode == (target / "config.json").stat().st_mode


def test_auto_keeps_the_type_of_a_folder_and_merges_adapters_in_fp32(tmp_path):
    base = tmp_path / "base"
    theirs = theirs_of(BYTE, base)
    change_weights(base, lambda tensors: {name: value.half() for name, value in tensors.items()})
    assert export_here(base, tmp_path / "half").code == 0
    assert {value.dtype for value in load_file(tmp_path / "half/model.safetensors").values()} == {torch.float16}
    save_adapter(tmp_path / "adapter", base)
    assert export_here(tmp_path / "adapter", tmp_path / "merged").code == 0
    merged = load_pretrained(tmp_path / "adapter")[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = load_theirs(tmp_path / "merged")(ids).logits[:, -1]
        torch.testing.assert_close(logits, merged(ids), atol=1e-4, rtol=0)
        assert (logits - theirs(ids).logits[:, -1]).abs().max() > 0.01  # the adapter changes something


def test_a_model_from_elsewhere_stays_greedy_in_transformers(tmp_path):
    theirs_of(BYTE, tmp_path / "base")
    assert export_here(tmp_path / "base", tmp_path / "out").code == 0
    settings = load_transformers().GenerationConfig.from_pretrained(tmp_path / "out")
    assert not settings.do_sample and settings.eos_token_id == 256


def test_a_checkpoint_of_nanogpt_becomes_a_hugging_face_folder(tmp_path):
    nano = save_nanogpt(tmp_path / "nano")
    save_tokenizer(BYTE, tmp_path / "nano")
    assert export_here(tmp_path / "nano", tmp_path / "out").code == 0
    assert names(tmp_path / "out") == EXPORTED
    ids = torch.arange(10)[None]
    with torch.no_grad():  # its GELU is another
        torch.testing.assert_close(load_theirs(tmp_path / "out")(ids).logits, nano(ids), atol=2e-3, rtol=0)


def test_the_chat_template_goes_with_the_model(tmp_path):
    folder = save(tiny_model(), BYTE.with_chat_template(chat_template(BYTE)), tmp_path / "run")
    assert export_here(folder, tmp_path / "out", "--dtype", "bf16").code == 0
    theirs = load_transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "a"}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == [256, *b"user\na", 256, *b"assistant\n"]
    assert theirs("a" + theirs.eos_token).input_ids == [97, 256]
    assert '"role": "user"' in (tmp_path / "out/README.md").read_text()


# ---- what is refused


def test_a_folder_or_file_in_the_place_stays_as_it_is(run, tmp_path):
    (tmp_path / "mine").mkdir()
    assert export_here(run, tmp_path / "mine").code == 0  # an empty one is taken
    before = (tmp_path / "mine/README.md").stat().st_mtime_ns
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name, what in (("mine", "holds other files"), ("file", "a file"), ("link", "a link")):
        done = export_here(run, tmp_path / name)
        assert done.code == 2 and done.last == f"error: {tmp_path / name}: {what}; give a new folder"
    assert (tmp_path / "mine/README.md").stat().st_mtime_ns == before
    assert names(tmp_path) == {"mine", "file", "empty", "link", *(f"mine/{name}" for name in EXPORTED)}


@pytest.mark.parametrize(
    "words, message",
    [
        (["run"], "nothing to write: give DIR, or --gguf FILE, or both"),
        (["run", "out", "--type", "f32"], "--type is for --gguf"),
        (["run", "--gguf", "x.gguf", "--dtype", "bf16"], "--dtype is for DIR"),
        (["run", "out", "--license", "MIT or so"], "must be an identifier of the hub, in lower case"),
        (["run", "out", "more"], "'more' belongs to no option"),
        (["run", "--out", "x"], "unknown option --out; here it is DIR"),
        (["none", "out"], "no such checkpoint folder"),
        (["run", "."], "no name of a folder"),
        (["run", "x/.."], "no name of a folder"),
        (["run", "--gguf", "model"], "--gguf model: its name must end in .gguf"),
        (["run", "x.gguf", "--gguf", "x.gguf"], "DIR is at or below --gguf"),
        (["run", "./x.gguf/more/../y", "--gguf", "x.gguf"], "DIR is at or below --gguf"),
    ],
)
def test_settings_without_a_meaning_are_refused_before_anything_is_created(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = export_here(*(word if word != "none" else "./none" for word in words))
    assert done.code == 2 and message in done.last
    assert not list(tmp_path.iterdir())


def test_the_help_explains_every_setting():
    assert explanations(ExportConfig).keys() == fields(ExportConfig).keys()
    done = export_here("--help")
    assert done.code == 0 and all(f"--{name} " in done.stdout for name in ("dtype", "license", "gguf", "type"))


def test_a_weight_that_fp16_cannot_hold_is_refused_and_bf16_can(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc.bias[3] = 1e5
    folder = save(model, BYTE, tmp_path / "run")
    done = export_here(folder, tmp_path / "out", "--dtype", "fp16")
    assert done.code == 2 and "too large for fp16; use --dtype bf16 or fp32" in done.last
    assert not (tmp_path / "out").exists()
    assert export_here(folder, tmp_path / "out", "--dtype", "bf16").code == 0


def test_the_new_names_are_flushed_to_the_disk(run, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(export, "sync_folder", lambda folder: flushed.append((folder, (folder / "out").exists())))
    assert export_here(run, tmp_path / "out").code == 0
    assert flushed == [(tmp_path, True)]


def test_a_failure_while_writing_leaves_nothing_and_names_the_reason(run, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    done = export_here(run, tmp_path / "out")
    assert done.code == 5 and f"{tmp_path / 'out'}: writing failed: No space left" in done.last
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_read_back_as_they_were_written_are_noticed(run, tmp_path, monkeypatch):
    def write_and_damage(folder, *rest):
        write(folder, *rest)
        change_weights(folder, lambda tensors: {name: value * 1.01 for name, value in tensors.items()})

    write = export.write_model
    monkeypatch.setattr(export, "write_model", write_and_damage)
    done = export_here(run, tmp_path / "out")
    assert done.code == 3 and "does not read back as it was written" in done.last
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    [step] = tmp_path.glob("run/step-*2")
    (step / "config.json").write_text("{}")
    done = export_here(tmp_path / "run", tmp_path / "out")
    assert done.code == 3 and not (tmp_path / "out").exists()


# ---- the same text in other programs (slow)

POEM = """The tide came in and the tide went out, and the harbour lights were low.
A fisherman counted his seven nets, and the wind began to blow.
He mended the first with a silver thread, the second with hair of a mare;
the others he left to the gulls and the sea, who never were known to care.
"""
PROMPTS = ("The tide came", "A fisherman counted", "the others he left")


@pytest.fixture(scope="module", params=["byte", "bpe:300", "gpt2"])
def learned(request, tmp_path_factory, bpe_cache):
    """A model that knows POEM by heart, so that greedy choices are clear, exported as a folder and a GGUF file: (its
    generator, the folder, the file)."""
    pytest.importorskip("gguf", reason="needs gguf, the extra [export]")
    root = tmp_path_factory.mktemp("learned")
    (root / "poem.txt").write_text(POEM * 40)
    prepare_here(root / "data", root / "poem.txt", tokenizer=request.param)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128, "global_batch_size": 8, "lr": 0.003}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    steps = 150 if request.param == "gpt2" else 400
    done = train_here("tiny", "--data", root / "data", "--out", root / "run", "--max_steps", steps, *flags)
    assert done.code == 0, done.stderr
    done = export_here(root / "run", root / "out", "--gguf", root / "x.gguf")
    assert done.code == 0, done.stderr
    return TextGenerator.load(root / "run", device="cpu", dtype="fp32"), root / "out", root / "x.gguf"


def greedy(generator, prompt):
    """Returns the ids of a prompt, and the 64 that our program adds."""
    [[completion]] = generator.generate(prompt, max_new_tokens=64, temperature=0)
    assert len(completion.ids) == 64
    return generator.tokenizer.encode(prompt), completion.ids


@pytest.mark.slow
def test_transformers_writes_the_same_64_tokens_and_so_does_its_pipeline(learned):
    generator, folder, _ = learned
    theirs, pipeline = load_theirs(folder), load_transformers().pipeline("text-generation", model=str(folder))
    for prompt in PROMPTS:
        asked, expected = greedy(generator, prompt)
        written = theirs.generate(torch.tensor([asked]), max_new_tokens=64, do_sample=False)[0].tolist()
        assert written == [*asked, *expected]
        [made] = pipeline(prompt, max_new_tokens=64, do_sample=False, clean_up_tokenization_spaces=False)
        assert made["generated_text"] == prompt + generator.tokenizer.decode(expected)


@pytest.mark.slow
def test_ctranslate2_writes_the_same_64_tokens(learned, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    generator, folder, _ = learned
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    theirs = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    words = load_transformers().AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        asked, expected = greedy(generator, prompt)
        tokens = [words.convert_ids_to_tokens(asked)]
        [made] = theirs.generate_batch(tokens, max_length=64, sampling_topk=1, include_prompt_in_result=False)
        assert made.sequences_ids == [expected]


@pytest.mark.slow
def test_llama_cpp_writes_the_same_64_tokens_from_the_f16_file(learned):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    generator, _, path = learned
    theirs = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False)
    for prompt in PROMPTS:
        asked, expected = greedy(generator, prompt)
        assert theirs.tokenize(prompt.encode()) == asked  # as it reads a prompt by default
        made = theirs.generate(asked, temp=0.0, repeat_penalty=1.0)
        assert list(itertools.islice(made, 64)) == expected


@pytest.mark.slow
def test_lm_eval_runs_a_local_task(learned, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    lines = POEM.splitlines()
    rows = [{"begin": line[:20], "ends": [line[20:], line[20:][::-1]], "label": 0} for line in lines]
    (tmp_path / "poem.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "poem",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "poem.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "poem.yaml").write_text(json.dumps(task))  # YAML reads JSON
    words = ["--model", "hf", "--model_args", f"pretrained={learned[1]}", "--tasks", "poem", "--device", "cpu"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True)
    [results] = tmp_path.glob("results/**/*.json")
    assert json.loads(results.read_text())["results"]["poem"]["acc,none"] == 1.0
