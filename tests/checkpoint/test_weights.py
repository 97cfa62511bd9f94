"""Folders that transformers wrote, read by us; the judge is its own output."""

import contextlib
import json
import os
import random
import struct

import pytest
import torch
from checkpoint_helpers import (
    SIZES,
    assert_same_outputs,
    change_config,
    change_weights,
    load_theirs,
    pickle_weights,
    released_size,
    save,
    theirs_of,
)
from safetensors.torch import load_file, save_file
from training_helpers import random_gradients, tiny_model

from gpt.checkpoint.read import load_pretrained
from gpt.checkpoint.weights import HEADER_LIMIT, read_safetensors, weights_of
from gpt.errors import InputError, IntegrityError
from gpt.model import GPT, ModelConfig
from gpt.train.optim import OptimConfig, make_optimizer
from gpt.train.state import optimizer_tensors


@pytest.mark.parametrize("name", SIZES)
def test_we_compute_transformers_logits_from_a_folder_it_saved(name, byte, tmp_path):
    size = released_size(name)
    theirs = theirs_of(byte, tmp_path, n_layer=1, n_head=size.n_head, n_embd=size.n_embd)
    ours, _, _ = load_pretrained(tmp_path)
    assert (ours.config, ours.vocab_size) == (ModelConfig(1, size.n_head, size.n_embd, 64, dropout=0.1), 257)
    assert_same_outputs(ours, theirs, 257)


def without_prefix(values):
    return {name.removeprefix("transformer."): value for name, value in values.items()}


def with_mask_buffers(values):
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool()}
    return values | masks | {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}


def with_equal_head(values):
    return values | {"lm_head.weight": values["transformer.wte.weight"].clone()}


def head_in_place_of_embedding(values):
    return {"lm_head.weight" if name.endswith("wte.weight") else name: value for name, value in values.items()}


@pytest.mark.parametrize(
    "change", [without_prefix, with_mask_buffers, with_equal_head, head_in_place_of_embedding], ids=lambda f: f.__name__
)
def test_spellings_of_the_same_weights_are_accepted(change, byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    change_weights(tmp_path, change)
    assert_same_outputs(load_pretrained(tmp_path)[0], theirs, 257)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_exactly(dtype, byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    change_weights(tmp_path, lambda values: {name: value.to(dtype) for name, value in values.items()})
    ours = load_pretrained(tmp_path)[0]
    expected = theirs.to(dtype).float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(ours).items())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_loaded_in_half_precision_are_those_of_a_model_converted_afterwards(dtype, stored, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, lambda values: {name: value.to(stored) for name, value in values.items()})
    ours, expected = load_pretrained(tmp_path, dtype)[0], load_pretrained(tmp_path)[0].to(dtype)
    assert {value.dtype for value in ours.parameters()} == {dtype}
    assert all(value.requires_grad and value.is_contiguous() for value in ours.parameters())
    expected = expected.state_dict()
    assert all(torch.equal(value, expected.pop(name)) for name, value in ours.state_dict().items())
    assert not expected


def test_a_value_too_large_for_the_precision_asked_for_is_no_damage(byte, tmp_path):
    theirs_of(byte, tmp_path)
    large = {"transformer.wte.weight": (257, 32), "transformer.h.0.mlp.c_fc.weight": (32, 128)}
    change_weights(tmp_path, lambda v: v | {name: torch.full(shape, -1e5) for name, shape in large.items()})
    ours = load_pretrained(tmp_path, torch.float16)[0]
    assert ours.token.weight[:257].isneginf().all()
    assert ours.blocks[0].mlp.fc.weight.isneginf().all()
    assert load_pretrained(tmp_path, torch.bfloat16)[0].blocks[0].mlp.fc.weight.isfinite().all()


def test_sharded_weights_are_read_through_their_index_and_a_missing_shard_is_named(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_outputs(load_pretrained(tmp_path)[0], theirs, 257)
    missing = sorted(tmp_path.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(IntegrityError, match=f"{missing.name}: missing"):
        load_pretrained(tmp_path)


PICKLED = {  # how the weights are pickled: the type of the numbers, torch's format, the number of files
    "fp32": (torch.float32, True, 1),
    "fp16": (torch.float16, True, 1),
    "older format": (torch.float32, False, 1),
    "shards": (torch.float32, True, 3),
    "shards in fp16 and the older format": (torch.float16, False, 2),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_pickled_weights_are_read_as_safetensors_are(kind, byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    pickle_weights(tmp_path, *PICKLED[kind])
    ours = load_pretrained(tmp_path)[0]
    expected = theirs.to(PICKLED[kind][0]).float()
    assert_same_outputs(ours, expected, 257)
    stored = expected.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in weights_of(ours).items())


def test_safetensors_are_taken_before_pickled_weights(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same_outputs(load_pretrained(tmp_path)[0], theirs, 257)


def test_a_missing_shard_of_pickled_weights_is_named(byte, tmp_path):
    theirs_of(byte, tmp_path)
    pickle_weights(tmp_path, files=2)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(IntegrityError, match=r"pytorch_model-00002-of-00002\.bin: missing"):
        load_pretrained(tmp_path)


def test_a_hub_caches_folder_of_links_is_read_through(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(tmp_path / f"blobs/{number}")
        (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / f"blobs/{number}")
    assert_same_outputs(load_pretrained(tmp_path / "snapshot")[0], theirs, 257)


def test_the_optimizers_file_of_a_deep_model_is_read(tmp_path):
    model = GPT(ModelConfig(n_layer=400, n_head=1, n_embd=1, block_size=1), vocab_size=1)
    optimizer = make_optimizer(model, OptimConfig())
    random_gradients(model, 1)
    optimizer.step(torch.tensor(0.0))
    tensors = optimizer_tensors(model, optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    assert int.from_bytes((tmp_path / "optimizer.safetensors").read_bytes()[:8], "little") > 1 << 20
    assert read_safetensors(tmp_path / "optimizer.safetensors").keys() == tensors.keys()


# ---- refused by name


REFUSED = {
    "model_type": "llama",
    "activation_function": "relu",
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-6,
    "n_inner": 100,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_make_another_model_is_refused_by_name(name, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_config(tmp_path, **{name: REFUSED[name]})
    with pytest.raises(InputError, match=f"{name} is "):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("values", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 128}])
def test_other_words_for_the_same_model_are_accepted(values, byte, tmp_path):
    theirs = theirs_of(byte, tmp_path)
    change_config(tmp_path, **values)
    assert_same_outputs(load_pretrained(tmp_path)[0], theirs, 257)


@pytest.mark.parametrize("values", [{"n_layer": "two"}, {"n_layer": None}, {"n_embd": float("inf")}])
def test_a_config_json_that_is_wrong_is_an_integrity_error(values, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(IntegrityError, match=r"config\.json: not a GPT-2 configuration"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [10**9, 10**30])
@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_positions", "vocab_size"])
def test_a_config_json_of_a_huge_model_is_refused_before_the_model_is_built(name, size, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_config(tmp_path, **{name: size})
    with pytest.raises(IntegrityError, match=r"config\.json: describes a model larger than the weights"):
        load_pretrained(tmp_path)


def test_an_untied_head_is_refused(byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, lambda values: values | {"lm_head.weight": values["transformer.wte.weight"] + 1e-3})
    with pytest.raises(InputError, match="untied head"):
        load_pretrained(tmp_path)


def dropped(name):
    return lambda values: {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (dropped("transformer.h.1.ln_1.bias"), "h.1.ln_1.bias is missing"),
        (lambda values: values | {"transformer.h.0.adapter": torch.zeros(3)}, "h.0.adapter is unknown"),
        (lambda values: {f"_orig_mod.{k}": v for k, v in values.items()}, "wte.weight is missing.*and 51 more"),
        (
            lambda values: values | {"transformer.wpe.weight": torch.zeros(63, 32)},
            r"wpe.weight is \(63, 32\), model wants \(64, 32\)",
        ),
        (lambda values: values | {"transformer.ln_f.bias": torch.zeros(32).int()}, "ln_f.bias is of type torch.int32"),
        (lambda values: values | {"ln_f.bias": torch.zeros(32)}, "ln_f.bias is stored twice"),
    ],
)
def test_fault_049_keys_that_do_not_fit_are_named(change, message, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(IntegrityError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_fault_050_a_single_value_that_is_not_finite_is_found_in_every_tensor(bad, dtype, byte, tmp_path):
    theirs_of(byte, tmp_path, n_layer=1)
    good = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert len(good) == 16
    for name in good:
        damaged = {key: value.clone() for key, value in good.items()}
        damaged[name].view(-1)[damaged[name].numel() * 2 // 3] = bad
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(IntegrityError, match=f"non-finite values in {name.removeprefix('transformer.')}: "):
            load_pretrained(tmp_path, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_050_weights_that_are_all_not_finite_are_not_loaded(bad, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, lambda v: v | {"transformer.h.1.mlp.c_fc.weight": torch.full((32, 128), bad)})
    with pytest.raises(IntegrityError, match=r"non-finite values in h\.1\.mlp\.c_fc\.weight"):
        load_pretrained(tmp_path)


def test_fault_051_the_tied_embedding_is_stored_once_and_tied_again(byte, tmp_path):
    folder = save(tiny_model(), byte, tmp_path)
    tables = [n for n, v in load_file(folder / "model.safetensors").items() if v.shape == (257, 16)]
    assert tables == ["transformer.wte.weight"]
    theirs = load_theirs(folder)
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    ours = load_pretrained(folder)[0].eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = ours(ids)[0, 200].item()
        ours.token.weight[200] += 1.0  # an id that is not in the input: only the head can notice
        assert abs(ours(ids)[0, 200].item() - before) > 1e-3


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "a\\b.safetensors", "a\x00b", "./a", "", 7])
def test_fault_108_a_name_in_a_weight_index_may_not_leave_the_folder(name, byte, tmp_path):
    theirs_of(byte, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(IntegrityError, match="path leaves"):
        load_pretrained(tmp_path / "model")


MALFORMED_INDEX = [
    *((text, "a JSON object") for text in ("", "[]", "[" * 100000)),
    *((text, "a weight index") for text in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}')),
]


@pytest.mark.parametrize(("text", "lacking"), MALFORMED_INDEX)
def test_a_malformed_weight_index_is_an_integrity_error(text, lacking, byte, tmp_path):
    theirs_of(byte, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IntegrityError, match=rf"index\.json: not {lacking}"):
        load_pretrained(tmp_path)


# ---- malformed safetensors files


def tensor_entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_safetensors(path, header, data=b"1234", size=None):
    """Writes a safetensors file; `header` is bytes or values for JSON, `size` its length (default: the true one)."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)


ENTRY = json.dumps(tensor_entry())
MALFORMED = {
    "length 2^63": ({"a": tensor_entry()}, 1 << 63),
    "length beyond the file": ({"a": tensor_entry()}, 10_000_000),
    "overlap": ({"a": tensor_entry(), "b": tensor_entry()}, None),
    "offset past the end": ({"a": tensor_entry(0, 400, (100,))}, None),
    "offset below zero": ({"a": tensor_entry(-4, 0)}, None),
    "bytes not covered": ({"a": tensor_entry(0, 2, (1,), "F16")}, None),
    "shape overflow": ({"a": tensor_entry(shape=(1 << 63, 1 << 63))}, None),
    "unknown type": ({"a": tensor_entry(dtype="Q8")}, None),
    "a type that torch lacks": ({"a": tensor_entry(0, 4, (16,), "F4") | {"dtype": "F6_E2M3", "shape": [16]}}, None),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, None),
    "key given twice": (f'{{"a": {ENTRY}, "a": {ENTRY}}}'.encode(), None),
    "a list": (b"[]", None),
    "a number": (b"7", None),
    "no UTF-8": (b'{"\xff": 1}', None),
    "deep nesting": (b"[" * 100_000, None),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", None),
    "large header": ({f"t{n}": tensor_entry(0, 0, (0,)) for n in range(HEADER_LIMIT // 50)}, None),
    "empty": (b"", None),
}


@pytest.mark.parametrize("header, size", MALFORMED.values(), ids=MALFORMED)
def test_fault_107_a_malformed_header_is_an_integrity_error(header, size, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", header, size=size)
    with pytest.raises(IntegrityError, match=r"x\.safetensors: not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20])
def test_fault_107_a_file_cut_in_its_header_is_an_integrity_error(length, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": tensor_entry()})
    os.truncate(tmp_path / "x.safetensors", length)
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fault_107_mutated_headers_are_read_or_refused(count, tmp_path):
    choose, path = random.Random(0), tmp_path / "x.safetensors"
    entries = {"__metadata__": {"format": "pt"}, "a": tensor_entry(), "b": tensor_entry(4, 16, (3, 2), "BF16")}
    header, read = json.dumps(entries).encode(), 0
    for _ in range(count):
        mutated = bytearray(header)
        for _ in range(choose.randint(1, 3)):
            start = choose.randrange(len(mutated))
            end = start + choose.randint(0, 3)
            mutated[start:end] = bytes(choose.choices(b'0123456789-e.,:"[]{}ab\xff', k=choose.randint(0, 3)))
        write_safetensors(path, bytes(mutated), b"0" * 16)
        with contextlib.suppress(IntegrityError):
            read += len(read_safetensors(path)) > 0
    assert 0 < read < count
