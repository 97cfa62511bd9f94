"""LoRA adapters as PEFT saves them: merged, they give the logits of the unmerged model of transformers, in which each
adapted layer adds scale * B(A(x))."""

import json
import math
import shutil

import pytest
import torch
from adapter_helpers import SETTINGS, adapted, save_adapter
from checkpoint_helpers import assert_same_outputs, change_config, load_theirs, theirs_of
from foreign_helpers import write
from safetensors.torch import load_file, save_file

from gpt.checkpoint.read import find_model_folder, load_pretrained, open_model
from gpt.errors import InputError, IntegrityError
from gpt.text.tokenizer import load_tokenizer, save_tokenizer, train_bpe


@pytest.fixture
def base(byte, tmp_path):
    theirs_of(byte, tmp_path / "base")
    return tmp_path / "base"


SCALES = {  # settings of the adapter, and the scale that PEFT documents for them
    "plain": ({}, lambda module: 3.0),
    "rank-stabilised": ({"use_rslora": True}, lambda module: 12 / math.sqrt(4)),
    "an alpha for some": ({"alpha_pattern": {"c_fc": 2}}, lambda module: 0.5 if module.endswith("c_fc") else 3.0),
    "an alpha for one": (
        {"alpha_pattern": {"transformer.h.1.attn.c_attn": 8, "c_attn": 4}},
        lambda module: {"transformer.h.1.attn.c_attn": 2.0, "transformer.h.0.attn.c_attn": 1.0}.get(module, 3.0),
    ),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", SCALES)
def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(kind, pickled, base, tmp_path):
    settings, scale_of = SCALES[kind]
    tensors = save_adapter(tmp_path / "adapter", base, pickled=pickled, **settings)
    ours, _, _ = load_pretrained(tmp_path / "adapter")
    assert_same_outputs(ours, adapted(base, tensors, scale_of), 257)


def test_an_adapter_of_some_modules_leaves_the_others_alone_and_half_precision_is_read(base, tmp_path):
    tensors = save_adapter(tmp_path / "adapter", base, modules=["attn.c_attn"])
    halved = {name: value.half() for name, value in tensors.items()}
    save_file(halved, tmp_path / "adapter/adapter_model.safetensors")
    ours, _, _ = load_pretrained(tmp_path / "adapter")
    assert_same_outputs(ours, adapted(base, {n: v.float() for n, v in halved.items()}, lambda _: 3.0), 257)
    plain = load_pretrained(base)[0]
    changed = {name for name, value in ours.named_parameters() if not torch.equal(value, plain.get_parameter(name))}
    assert changed == {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}


def test_whole_tensors_take_the_place_of_the_bases_with_more_ids(byte, base, tmp_path):
    more = torch.cat([load_file(base / "model.safetensors")["transformer.wte.weight"], torch.ones(3, 32)])
    bias = {
        "transformer.h.0.attn.c_attn.base_layer.bias": torch.full((96,), 0.5),
        "transformer.ln_f.bias": torch.ones(32),
    }
    save_adapter(
        tmp_path / "adapter", base, whole={"transformer.wte.weight": more, "lm_head.weight": more.clone()} | bias
    )
    stored = open_model(tmp_path / "adapter")
    assert stored.vocab_size == 260
    ours, _, _ = load_pretrained(tmp_path / "adapter")
    assert torch.equal(ours.ln_f.bias, torch.ones(32))
    assert torch.equal(ours.blocks[0].attn.qkv.bias, bias["transformer.h.0.attn.c_attn.base_layer.bias"])
    assert torch.equal(ours.token.weight[:257], more[:257])


def test_the_tokenizer_is_the_adapters_else_its_bases(byte, base, tmp_path):
    save_adapter(tmp_path / "adapter", base)
    assert load_pretrained(tmp_path / "adapter")[1].identity == byte.identity
    own = train_bpe(["the cat sat on the mat " * 50], 256)
    save_tokenizer(own, tmp_path / "adapter")
    assert (
        load_pretrained(tmp_path / "adapter")[1].identity
        == own.identity
        == load_tokenizer(tmp_path / "adapter").identity
    )


def test_a_trainers_newest_checkpoint_may_be_an_adapter(base, tmp_path, capsys):
    for step in (5, 12):
        tensors = save_adapter(tmp_path / f"out/checkpoint-{step}", base, lora_alpha=step)
    assert find_model_folder(tmp_path / "out").name == "checkpoint-12"
    assert_same_outputs(load_pretrained(tmp_path / "out")[0], adapted(base, tensors, lambda _: 3.0), 257)


def test_a_config_json_beside_an_adapter_changes_nothing_and_a_merged_model_comes_before_it(base, tmp_path):
    tensors = save_adapter(tmp_path / "adapter", base)
    shutil.copy(base / "config.json", tmp_path / "adapter")
    merged = adapted(base, tensors, lambda module: 3.0)
    assert_same_outputs(load_pretrained(tmp_path / "adapter")[0], merged, 257)
    shutil.copy(base / "model.safetensors", tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    assert_same_outputs(load_pretrained(tmp_path / "adapter")[0], load_theirs(base), 257)


# ---- refused


def refusal(folder, kind=InputError):
    """Returns the line that refuses an adapter."""
    with pytest.raises(kind) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "the alpha_pattern '(a+)+$'"),
    ],
)
def test_adapters_that_need_peft_get_the_command_that_merges_them(settings, what, base, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, base, **settings)
    line = refusal(folder)
    assert line.startswith(
        f"{folder}: an adapter with {what}, which is not supported; merge it and give {folder}-merged"
    )
    code = line.split('python -c "')[1].removesuffix('"')
    compile(code, "command", "exec")
    assert "merge_and_unload" in code
    assert f"T.from_pretrained('{base}').save_pretrained('{folder}-merged')" in code


def test_an_adapter_of_a_classifier_is_named(base, tmp_path):
    save_adapter(tmp_path / "adapter", base, task_type="SEQ_CLS")
    assert "task_type SEQ_CLS, not a language model" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("whole", "what"),
    [
        ({"transformer.wte.lora_embedding_A": torch.zeros(4, 257)}, "an adapter with wte.lora_embedding_A"),
        ({"transformer.h.0.attn.c_attn.lora_magnitude_vector": torch.zeros(96)}, "lora_magnitude_vector"),
        ({f"transformer.wte.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}, "lora_A of wte"),
        ({f"transformer.h.01.mlp.c_fc.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}, "lora_A of h.01.mlp"),
        ({"transformer.wte.weight": torch.zeros(257, 32)}, "an embedding that is not the head's"),
        ({"lm_head.weight": torch.zeros(257, 32)}, "untied head"),
        ({"score.weight": torch.zeros(2, 32)}, "the head of a classifier"),
    ],
)
def test_tensors_that_are_not_supported_are_named(whole, what, base, tmp_path):
    save_adapter(tmp_path / "adapter", base, whole=whole)
    assert what in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n_embd": 64}, r"h.0.attn.c_attn is (64, 192) there, the adapter has (4, 32) and (96, 4)"),
        ({"n_layer": 1}, "which has 1 layers and no h.1.attn.c_attn"),
    ],
)
def test_an_adapter_whose_base_is_another_is_named(change, what, byte, base, tmp_path):
    save_adapter(tmp_path / "adapter", tmp_path / "other")
    theirs_of(byte, tmp_path / "other", **change)
    line = refusal(tmp_path / "adapter")
    assert line.startswith(f"{tmp_path}/adapter: made for another base than {tmp_path}/other")
    assert what in line
    assert line.endswith("; give that base")


def test_an_adapter_whose_base_is_missing_is_named(base, tmp_path):
    save_adapter(tmp_path / "adapter", tmp_path / "gone")
    line = refusal(tmp_path / "adapter")
    assert line.startswith(
        f"{tmp_path}/adapter: an adapter; its base, by adapter_config.json: {tmp_path}/gone: no such"
    )
    save_adapter(tmp_path / "second", tmp_path / "adapter")
    save_adapter(tmp_path / "adapter", base)
    assert "no config.json" in refusal(tmp_path / "second")  # an adapter of an adapter
    write(tmp_path / "nameless", adapter_config={"peft_type": "LORA"})
    assert "names no base model" in refusal(tmp_path / "nameless")


def test_damaged_adapters_are_integrity_errors(base, tmp_path):
    tensors = save_adapter(tmp_path / "adapter", base)
    path = tmp_path / "adapter/adapter_model.safetensors"
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert "h.1.mlp.c_fc has only one of lora_A and lora_B" in refusal(tmp_path / "adapter", IntegrityError)
    save_file(tensors | {name: torch.full((128, 4), float("nan"))}, path)
    assert "non-finite values in h.1.mlp.c_fc.weight" in refusal(tmp_path / "adapter", IntegrityError)
    path.unlink()
    assert "adapter_config.json without adapter_model.safetensors" in refusal(tmp_path / "adapter")
    for text in ("", "[]", json.dumps(SETTINGS | {"base_model_name_or_path": str(base), "lora_alpha": "x"})):
        save_adapter(tmp_path / "adapter", base)
        (tmp_path / "adapter/adapter_config.json").write_text(text)
        assert "adapter_config.json: no" in refusal(tmp_path / "adapter", IntegrityError)


def test_a_bases_config_json_is_judged_as_ever(base, tmp_path):
    save_adapter(tmp_path / "adapter", base)
    change_config(base, activation_function="relu")
    assert "activation_function is 'relu'" in refusal(tmp_path / "adapter")
