"""Checkpoints of nanoGPT: the logits are those of a plain rewrite of its model; the tokenizer is GPT-2's or refused."""

import pytest
import torch
from foreign_helpers import write
from nanogpt_helpers import NanoGPT, save_nanogpt
from torch.nn import functional as F

from gpt.checkpoint.read import find_model_folder, load_pretrained
from gpt.errors import InputError, IntegrityError
from gpt.text.tokenizer import load_tokenizer, save_tokenizer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_a_checkpoint_are_nanogpts_with_and_without_biases(bias, compiled, byte, tmp_path):
    theirs = save_nanogpt(tmp_path, bias=bias, compiled=compiled)
    save_tokenizer(byte, tmp_path)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        ours, tokenizer, _ = load_pretrained(path)
        assert (ours.vocab_size, tokenizer.identity) == (257, byte.identity)
        ids = torch.randint(0, 257, (2, 20))
        with torch.no_grad():
            logits = theirs(ids)
            torch.testing.assert_close(ours(ids), logits[:, -1, :257], atol=1e-4, rtol=0)
            losses = F.cross_entropy(logits[:, :-1, :257].transpose(1, 2), ids[:, 1:], reduction="none")
            torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), losses, atol=1e-4, rtol=0)
    assert all((value == 0).all() == (not bias) for name, value in ours.named_parameters() if name.endswith("bias"))


def test_a_padded_vocabulary_is_cropped_to_gpt2s_tokenizer(bpe_cache, tmp_path, capsys):
    theirs = save_nanogpt(tmp_path, vocab_size=50304, n_embd=8)
    ours, tokenizer, _ = load_pretrained(tmp_path / "ckpt.pt")
    assert (ours.vocab_size, tokenizer.identity) == (50257, load_tokenizer("gpt2").identity)
    assert "assuming gpt2's" in capsys.readouterr().err
    ids = torch.randint(0, 50257, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids)[:, -1, :50257], atol=1e-4, rtol=0)


def test_a_model_of_characters_is_refused_by_name_and_its_pickle_is_not_opened(tmp_path):
    save_nanogpt(tmp_path, vocab_size=65)
    with pytest.raises(InputError, match=r"65 ids, no tokenizer beside it .*--tokenizer byte"):
        load_pretrained(tmp_path)
    save_nanogpt(tmp_path, vocab_size=50304, n_embd=8)
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(InputError, match=r"its tokens are characters \(.*meta\.pkl, a pickle\)"):
        find_and_load(tmp_path)


def find_and_load(path):
    """Does what train.py --init does."""
    return load_pretrained(find_model_folder(path))


@pytest.mark.parametrize(
    "settings", [{}, None, {"n_layer": "two"}, {"n_layer": None}, {"n_embd": float("inf")}, {"vocab_size": [1]}]
)
def test_model_args_that_are_wrong_are_an_integrity_error(settings, byte, tmp_path):
    save_nanogpt(tmp_path)
    values = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    values["model_args"] = settings and values["model_args"] | settings
    torch.save(values, tmp_path / "ckpt.pt")
    with pytest.raises(IntegrityError, match="no model_args of nanoGPT"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "vocab_size"])
def test_fault_106_model_args_of_a_huge_model_are_refused_before_the_model_is_built(name, byte, tmp_path):
    save_nanogpt(tmp_path)
    save_tokenizer(byte, tmp_path)
    values = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    values["model_args"][name] = 10**9
    torch.save(values, tmp_path / "ckpt.pt")
    with pytest.raises(IntegrityError, match="describes a model larger than the weights"):
        load_pretrained(tmp_path)


def test_another_layout_is_refused_by_the_names_of_its_tensors(byte, tmp_path):
    save_nanogpt(tmp_path)
    save_tokenizer(byte, tmp_path)
    values = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    values["model"]["transformer.h.0.attn.q_norm.weight"] = torch.ones(8)
    torch.save(values, tmp_path / "ckpt.pt")
    with pytest.raises(IntegrityError, match=r"h\.0\.attn\.q_norm\.weight is unknown"):
        load_pretrained(tmp_path)


def test_a_folder_with_a_model_of_its_own_is_not_nanogpts(byte, tmp_path):
    save_nanogpt(tmp_path)
    write(tmp_path, config={"model_type": "llama"})
    with pytest.raises(InputError, match="model_type is 'llama'"):
        load_pretrained(tmp_path)


def test_the_rewrite_has_nanogpts_names():
    """The names and shapes of `GPT(GPTConfig(n_layer=1, …)).state_dict()` of nanoGPT at 3adf61e, written down there."""
    shapes = {name: tuple(value.shape) for name, value in NanoGPT(1, 2, 8, 16, 32, bias=True).state_dict().items()}
    assert shapes == {
        "transformer.wte.weight": (32, 8),
        "transformer.wpe.weight": (16, 8),
        "transformer.h.0.ln_1.weight": (8,),
        "transformer.h.0.ln_1.bias": (8,),
        "transformer.h.0.attn.c_attn.weight": (24, 8),
        "transformer.h.0.attn.c_attn.bias": (24,),
        "transformer.h.0.attn.c_proj.weight": (8, 8),
        "transformer.h.0.attn.c_proj.bias": (8,),
        "transformer.h.0.ln_2.weight": (8,),
        "transformer.h.0.ln_2.bias": (8,),
        "transformer.h.0.mlp.c_fc.weight": (32, 8),
        "transformer.h.0.mlp.c_fc.bias": (32,),
        "transformer.h.0.mlp.c_proj.weight": (8, 32),
        "transformer.h.0.mlp.c_proj.bias": (8,),
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
        "lm_head.weight": (32, 8),
    }
