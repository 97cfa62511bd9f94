"""Folders that transformers and CTranslate2 read, and folders of theirs that we read; the judge is their own output."""

import dataclasses
import json
import shutil
import stat

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training_helpers import make_data, save_step, tiny_model, train_here

from gpt.checkpoint.folder import load_pretrained, save_checkpoint
from gpt.checkpoint.weights import weights_of
from gpt.errors import InputError, IntegrityError, NonFiniteError
from gpt.generate.sampling import SamplingParams
from gpt.model import GPT, ModelConfig
from gpt.text.huggingface import to_huggingface
from gpt.text.tokenizer import load_tokenizer, save_tokenizer, train_bpe

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

SIZES = {"gpt2": (12, 768), "gpt2-medium": (16, 1024), "gpt2-large": (20, 1280), "gpt2-xl": (25, 1600)}
MIXED = "The fox's 12345 naïve jumps;\n\n  didn't 雨 😀\t<|endoftext|> end. "
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("byte")


def released_size(name):
    """One layer of a released model: the full width and number of heads."""
    n_head, n_embd = SIZES[name]
    return ModelConfig(n_layer=1, n_head=n_head, n_embd=n_embd, block_size=64)


def save(model, tokenizer, out):
    defaults = dataclasses.asdict(SamplingParams())
    return save_checkpoint(out, 1, model, tokenizer, {}, {}, defaults, {"dataset": {"train": []}})


def theirs_of(tokenizer, folder, **changes):
    """A random GPT2LMHeadModel of transformers, saved in `folder` with its tokenizer."""
    torch.manual_seed(0)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": tokenizer.vocab_size}
    config = transformers.GPT2Config(**(values | {"bos_token_id": 256, "eos_token_id": 256} | changes))
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model


def change_weights(folder, change):
    """Rewrite model.safetensors with what `change` makes of its name -> tensor."""
    path = folder / "model.safetensors"
    values = change({name: value.clone() for name, value in load_file(path).items()})
    save_file({name: value.contiguous() for name, value in values.items()}, path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def assert_same_outputs(ours, theirs, vocab_size):
    """Losses at every position and the last position's logits agree."""
    torch.manual_seed(1)
    ids = torch.randint(0, vocab_size, (2, min(48, ours.config.block_size)))
    logits = theirs(ids).logits[..., :vocab_size].float()
    torch.testing.assert_close(ours.eval()(ids), logits[:, -1], atol=TOLERANCE, rtol=0)
    if logits.shape[-1] == theirs.config.vocab_size:
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
        torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), expected, atol=TOLERANCE, rtol=0)


def load_theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ---- our folders, read by others


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
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(MIXED)["input_ids"] == tokenizer.encode(MIXED)
    assert theirs.decode(tokenizer.encode(MIXED)) == MIXED
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eot
    assert theirs.model_max_length == 32


def test_the_names_in_our_weight_file_are_those_of_transformers(byte, tmp_path):
    folder = save_step(tmp_path, 1)
    stored = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel(config).state_dict()
    theirs.pop("lm_head.weight")
    assert stored == {name: tuple(value.shape) for name, value in theirs.items()}


def test_a_run_folders_best_link_is_a_model_for_transformers(tmp_path):
    data = make_data(tmp_path / "data", train_size=2000)
    assert train_here("tiny", "--data", data, "--out", tmp_path / "run", "--max_steps", "6").code == 0
    model, tokenizer, _ = load_pretrained(tmp_path / "run/best")
    assert_same_outputs(model, load_theirs(tmp_path / "run/best"), 257)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/best")
    assert theirs(MIXED)["input_ids"] == tokenizer.encode(MIXED)
    by_run = load_pretrained(tmp_path / "run")[0]
    assert torch.equal(by_run.token.weight, model.token.weight)


def test_the_generation_settings_we_store_are_ours_in_transformers_words(byte, tmp_path):
    folder = save_step(tmp_path, 1)
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.validate(strict=True)
    assert settings.do_sample and (settings.temperature, settings.top_p, settings.top_k) == (0.8, 0.95, 0)
    assert settings.eos_token_id == settings.pad_token_id == byte.eot
    text = load_theirs(folder).generate(torch.tensor([[5, 6]]), max_new_tokens=3, generation_config=settings)
    assert text.shape[0] == 1
    assert text.shape[1] in (3, 4, 5)


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


def test_ctranslate2_converts_our_step_folder_and_chooses_our_tokens(byte, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = tiny_model(n_layer=2, n_embd=32, block_size=64, seed=3).eval()
    folder = save_step(tmp_path, 1, model)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    ids = byte.encode("once the sea")
    tokens = transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    [result] = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32").generate_batch(
        [tokens], max_length=8, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    expected = []
    with torch.no_grad():
        while len(expected) < 8:
            expected.append(int(model(torch.tensor([ids + expected])).argmax()))
    assert result.sequences_ids[0] == expected


# ---- their folders, read by us


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


def test_a_hub_caches_folder_of_links_is_read_through(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(tmp_path / f"blobs/{number}")
        (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / f"blobs/{number}")
    assert_same_outputs(load_pretrained(tmp_path / "snapshot")[0], theirs, 257)


def test_a_vocabulary_padded_beyond_the_tokenizer_is_cropped(byte, tmp_path):
    theirs = theirs_of(byte, tmp_path, vocab_size=320)
    ours, tokenizer, _ = load_pretrained(tmp_path)
    assert ours.vocab_size == tokenizer.vocab_size == 257
    assert_same_outputs(ours, theirs, 257)
    again = save(ours, tokenizer, tmp_path / "run")
    assert load_file(again / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(byte, tmp_path):
    theirs_of(byte, tmp_path, vocab_size=200, bos_token_id=0, eos_token_id=0)
    with pytest.raises(IntegrityError, match="the tokenizer has 257 ids, the model 200"):
        load_pretrained(tmp_path)


def test_vocab_json_and_merges_txt_do_instead_of_tokenizer_json(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat " * 50], 265)
    theirs_of(tokenizer, tmp_path)
    model = to_huggingface(tokenizer.vocabulary)[0]["model"]
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


@pytest.mark.parametrize(
    "values",
    [{"n_layer": "two"}, {"n_layer": None}, {"n_embd": float("inf")}, {"n_layer": 10**9}, {"n_positions": 10**12}],
)
def test_a_config_json_that_is_wrong_is_an_integrity_error(values, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(IntegrityError):
        load_pretrained(tmp_path)


def test_an_untied_head_is_refused(byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, lambda values: values | {"lm_head.weight": values["transformer.wte.weight"] + 1e-3})
    with pytest.raises(InputError, match="untied head"):
        load_pretrained(tmp_path)


def test_a_folder_with_pickle_weights_alone_is_refused_and_they_are_not_opened(byte, tmp_path):
    theirs_of(byte, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickle weights"):
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
        (lambda values: values | {"transformer.ln_f.bias": torch.zeros(32).int()}, "ln_f.bias is of type I32"),
        (lambda values: values | {"wte.weight": values["transformer.wte.weight"].clone()}, "wte.weight is there twice"),
    ],
)
def test_fault_049_keys_that_do_not_fit_are_named(change, message, byte, tmp_path):
    theirs_of(byte, tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(IntegrityError, match=message):
        load_pretrained(tmp_path)


def test_fault_049_no_wrappers_prefix_reaches_the_disk(byte, tmp_path):
    model = tiny_model()
    model.compile()
    folder = save(model, byte, tmp_path)
    assert all(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_fault_050_a_single_value_that_is_not_finite_is_found_in_every_tensor(bad, dtype, byte, tmp_path):
    theirs_of(byte, tmp_path, n_layer=1)
    good = load_file(tmp_path / "model.safetensors")
    assert len(good) == 16
    for name in good:
        damaged = {key: value.clone() for key, value in good.items()}
        damaged[name].view(-1)[damaged[name].numel() * 2 // 3] = bad
        save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(IntegrityError, match=f"non-finite values in {name.removeprefix('transformer.')}: "):
            load_pretrained(tmp_path, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_050_weights_that_are_not_finite_are_neither_saved_nor_loaded(bad, byte, tmp_path):
    theirs_of(byte, tmp_path / "theirs")
    change_weights(tmp_path / "theirs", lambda v: v | {"transformer.h.1.mlp.c_fc.weight": torch.full((32, 128), bad)})
    with pytest.raises(IntegrityError, match=r"non-finite values in h\.1\.mlp\.c_fc\.weight"):
        load_pretrained(tmp_path / "theirs")
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc.bias[3] = bad
    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_fc\.bias"):
        save(model, byte, tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100000])
def test_a_malformed_weight_index_is_an_integrity_error(text, byte, tmp_path):
    theirs_of(byte, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"index\.json"):
        load_pretrained(tmp_path)
