"""GGUF files: what the package gguf and llama.cpp read from them is the model and the tokenizer."""

import errno
import importlib.util
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_helpers import save
from safetensors.numpy import load_file
from tokenizer_helpers import byte_ranks, random_texts, small_tokenizer, write_rank_file
from training_helpers import in_process, tiny_model

from gpt.errors import InputError
from gpt.report import export, gguf_file
from gpt.report.gguf_file import llama_tokenizer
from gpt.text.examples import chat_template
from gpt.text.huggingface import PATTERNS
from gpt.text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs gguf, the extra [export]")
F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
TENSORS = {  # llama.cpp's names -> Hugging Face's
    "token_embd.weight": "wte.weight",
    "position_embd.weight": "wpe.weight",
    **{f"output_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")},
    **{
        f"blk.{layer}.{theirs}.{kind}": f"h.{layer}.{ours}.{kind}"
        for layer in range(2)
        for kind in ("weight", "bias")
        for theirs, ours in {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }.items()
    },
}


def export_here(*args):
    return in_process(export.main, "export", *args)


# Reading 100,000 strings takes the package gguf seconds.
@pytest.fixture(scope="module", params=["byte", "bpe", pytest.param("gpt2", marks=pytest.mark.slow)])
def made(request, tmp_path_factory, bpe_cache):
    """A checkpoint with each kind of tokenizer: (its tokenizer, its folder, its GGUF file in f16)."""
    tokenizer = small_tokenizer() if request.param == "bpe" else load_tokenizer(request.param)
    root = tmp_path_factory.mktemp(request.param)
    folder = save(tiny_model(tokenizer.vocab_size, n_embd=32), tokenizer, root / "run")
    done = export_here(folder, "--gguf", root / "x.gguf", "--license", "mit")
    assert done.code == 0, done.stderr
    return tokenizer, folder, root / "x.gguf"


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def weights(folder):
    """Returns llama.cpp's name -> the values in Hugging Face's file, matrices as (out, in)."""
    stored = load_file(folder / "model.safetensors")
    values = {theirs: stored[f"transformer.{ours}"] for theirs, ours in TENSORS.items()}
    is_matrix = {name: name.startswith("blk.") and value.ndim == 2 for name, value in values.items()}
    return {name: value.T if is_matrix[name] else value for name, value in values.items()}


def test_the_tensors_are_those_of_the_folder(made):
    _, folder, path = made
    found, expected = tensors(path), weights(folder)
    assert found.keys() == expected.keys() == TENSORS.keys()
    for name, value in expected.items():
        matrix = value.ndim == 2 and name != "position_embd.weight"
        assert found[name].tensor_type == (F16 if matrix else F32)
        assert np.array_equal(found[name].data, value.astype(np.float16) if matrix else value)


def test_the_settings_are_those_of_the_model(made):
    tokenizer, _, path = made
    found = fields(path)
    sizes = {"context_length": 32, "embedding_length": 32, "block_count": 2, "feed_forward_length": 128}
    sizes |= {"attention.head_count": 2, "vocab_size": tokenizer.vocab_size}
    assert {name: found[f"gpt2.{name}"] for name in sizes} == sizes
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (found["general.architecture"], found["general.name"], found["general.license"]) == ("gpt2", "x", "mit")
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    ids = {f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "padding")}
    assert {found[name] for name in ids} == {tokenizer.eot}
    assert not found["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.chat_template" not in found


def test_hugging_faces_engine_with_the_llama_tokenizer_the_file_gives_our_ids(made):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, _, path = made
    found = fields(path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, merges = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.merges"]
    types = found["tokenizer.ggml.token_type"]
    assert [n for n, kind in enumerate(types) if kind != gguf.TokenType.NORMAL] == [tokenizer.eot]
    assert types[tokenizer.eot] == gguf.TokenType.CONTROL and tokens[tokenizer.eot] == "<|endoftext|>"
    if tokenizer.name == "byte":
        assert merges == ["<|endoftext|> <|endoftext|>"]  # never applies
        merges = []
    vocab = {text: rank for rank, text in enumerate(tokens)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in random_texts(30):
        assert engine.encode(text).ids == tokenizer.encode(text)


def test_llama_cpp_gives_our_ids_for_hostile_texts_and_reads_end_of_text_where_it_is_asked_to(made):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    tokenizer, _, path = made
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in random_texts(60):
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)
    text = "a<|endoftext|>b"
    assert theirs.tokenize(text.encode(), special=True) == tokenizer.encode(text, allow_special=True)


def test_q8_0_is_within_half_a_step_and_rows_that_do_not_fit_stay_f16(tmp_path):
    byte = load_tokenizer("byte")
    for width, kind in ((64, Q8_0), (48, F16)):
        folder = save(tiny_model(n_embd=width), byte, tmp_path / str(width))
        path = tmp_path / f"{width}.gguf"
        assert export_here(folder, "--gguf", path, "--type", "q8_0").code == 0
        found = tensors(path)
        assert found["blk.0.attn_qkv.weight"].tensor_type == found["token_embd.weight"].tensor_type == kind
        assert found["blk.0.ffn_down.weight"].tensor_type == Q8_0  # its rows are four times as long
        assert found["position_embd.weight"].tensor_type == F32
        value = weights(folder)["blk.1.ffn_down.weight"]
        blocks = value.reshape(width, -1, 32)
        step = abs(blocks).max(-1, keepdims=True) / 127
        stored = gguf.quants.dequantize(found["blk.1.ffn_down.weight"].data, Q8_0).reshape(blocks.shape)
        assert (abs(stored - blocks) <= 0.6 * step).all()  # the scale itself is rounded to f16


def test_the_chat_template_and_every_id_that_ends_a_text_are_stored(tmp_path):
    ids = {"<|endoftext|>": 256, "<|im_end|>": 257, "<|x|>": 260}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, byte_ranks(), special_tokens=ids))
    template = chat_template(tokenizer)
    folder = save(tiny_model(261), tokenizer.with_chat_template(template), tmp_path / "run")
    settings = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [256, 257, 260]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "training/manifest.json").unlink()
    assert export_here(folder, "--gguf", tmp_path / "x.gguf").code == 0
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.chat_template"] == template
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [256, 257, 260]
    unused = gguf.TokenType.UNUSED
    assert found["tokenizer.ggml.token_type"][256:] == [gguf.TokenType.CONTROL] * 2 + [unused] * 2 + [3]
    assert len(set(found["tokenizer.ggml.tokens"])) == 261


@pytest.mark.parametrize("bos", ["<|endoftext|>", "<|x|>"])
def test_the_token_before_each_text_is_end_of_text_whatever_the_bos_token_is(tmp_path, bos):
    ids = {"<|endoftext|>": 256, "<|x|>": 257}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, byte_ranks(), special_tokens=ids))
    additions = replace(tokenizer.additions, begins=True, roles={"bos_token": bos})
    folder = save(tiny_model(258, n_embd=32), replace(tokenizer, additions=additions), tmp_path / "run")
    assert export_here(folder, "--gguf", tmp_path / "x.gguf").code == 0
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.bos_token_id"] == 256


@pytest.mark.parametrize(
    "pattern, what",
    [(PATTERNS["cl100k"][0], "the pattern of cl100k"), (r"\p{L}+|[^\p{L}]+", "a pattern that llama.cpp lacks")],
)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(tmp_path, pattern, what):
    ranks = byte_ranks() | {b"ab": 256}
    tokenizer = load_tokenizer(write_rank_file(tmp_path, ranks, pattern=pattern))
    folder = save(tiny_model(258), tokenizer, tmp_path / "run")
    done = export_here(folder, tmp_path / "out", "--gguf", tmp_path / "x.gguf")
    assert done.code == 2 and done.last.endswith(f"has {what}; give DIR alone, for other programs")
    assert not (tmp_path / "x.gguf").exists() and not (tmp_path / "out").exists()


def test_ranks_that_are_no_list_of_merges_are_refused(tmp_path):
    ranks = byte_ranks() | {b"abc": 256, b"ab": 257}
    with pytest.raises(InputError, match="ranks that are no list of merges"):
        llama_tokenizer(load_tokenizer(write_rank_file(tmp_path, ranks)))


def test_other_files_stay_and_an_earlier_gguf_file_is_replaced(made, tmp_path):
    _, folder, _ = made
    path = tmp_path / "x.gguf"
    path.write_text("my diary")
    done = export_here(folder, "--gguf", path)
    assert (done.code, path.read_text()) == (2, "my diary") and "another kind of file" in done.last
    path.write_bytes(b"GGUF an earlier one")
    assert export_here(folder, "--gguf", path, "--type", "f32").code == 0
    assert tensors(path)["token_embd.weight"].tensor_type == F32
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]
    (tmp_path / "folder.gguf").mkdir()
    for place in ("folder.gguf", "none/x.gguf"):
        done = export_here(folder, "--gguf", tmp_path / place)
        assert done.code == 2 and "must be a file in an existing folder" in done.last
    (tmp_path / "link.gguf").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.gguf")
    for place in ("link.gguf", "pipe.gguf"):
        done = export_here(folder, "--gguf", tmp_path / place)
        assert done.code == 2 and "another kind of file" in done.last
    assert export_here(folder, tmp_path / "new", "--gguf", tmp_path / "new/x.gguf").code == 0
    assert fields(tmp_path / "new/x.gguf")["general.name"] == "x" and (tmp_path / "new/README.md").exists()


def test_without_the_package_one_line_says_what_brings_it(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = export_here(made[1], tmp_path / "out", "--gguf", tmp_path / "x.gguf")
    assert done.code == 2 and "[export]" in done.last and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, too_large", [("f16", 66000.0), ("q8_0", 1e7)])
def test_a_weight_that_the_type_cannot_hold_is_refused_before_anything_is_written(tmp_path, kind, too_large):
    model = tiny_model(n_embd=32)
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[5, 3] = -too_large
    folder = save(model, load_tokenizer("byte"), tmp_path / "run")
    words = (folder, tmp_path / "out", "--gguf", tmp_path / "x.gguf", "--type")
    done = export_here(*words, kind)
    assert done.code == 2
    assert done.last.endswith(f"a weight of blocks.1.mlp.fc.weight is too large for {kind}; use --type f32")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export_here(*words, "f32").code == 0


def test_a_chat_template_that_is_no_jinja_is_stored_as_it_is(tmp_path):
    tokenizer = load_tokenizer("byte").with_chat_template("{% for")
    folder = save(tiny_model(n_embd=32), tokenizer, tmp_path / "run")
    done = export_here(folder, "--gguf", tmp_path / "x.gguf")
    assert done.code == 0, done.stderr
    assert fields(tmp_path / "x.gguf")["tokenizer.chat_template"] == "{% for"
    if importlib.util.find_spec("llama_cpp"):
        assert "warning: llama-cpp-python cannot read the chat template" in done.stderr


def test_the_new_name_is_flushed_to_the_disk_and_a_failure_leaves_nothing(made, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(gguf_file, "sync_folder", lambda folder: flushed.append((folder, os.listdir(folder))))
    assert export_here(made[1], "--gguf", tmp_path / "x.gguf").code == 0
    assert flushed == [(tmp_path, ["x.gguf"])]

    def refused(*paths):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    done = export_here(made[1], "--gguf", tmp_path / "y.gguf")
    assert done.code == 5 and "y.gguf: writing failed: Permission denied; free some space or make it w" in done.last
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_a_file_that_was_damaged_while_it_was_written_is_noticed(made, tmp_path, monkeypatch):
    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, values: write(self, values * 0))
    done = export_here(made[1], "--gguf", tmp_path / "x.gguf")
    assert done.code == 3 and "does not read back" in done.last
    assert not list(tmp_path.iterdir())
