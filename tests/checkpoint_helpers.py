"""For tests of checkpoints: models of transformers, and what is done to files."""

import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gpt.checkpoint.read import OPTIMIZER, STATE
from gpt.checkpoint.write import save_checkpoint
from gpt.generate.sampling import SamplingParams
from gpt.model import ModelConfig
from gpt.text.tokenizer import save_tokenizer

SIZES = {"gpt2": (12, 768), "gpt2-medium": (16, 1024), "gpt2-large": (20, 1280), "gpt2-xl": (25, 1600)}
MIXED = "The fox's 12345 naïve jumps;\n\n  didn't 雨 😀\t<|endoftext|> end. "
TOLERANCE = 1e-4
FILES = (  # of a step folder
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training/manifest.json",
    "training/optimizer.safetensors",
    "training/state.json",
)


def released_size(name):
    """Returns the ModelConfig of one layer of a released model, with its full width and number of heads."""
    n_head, n_embd = SIZES[name]
    return ModelConfig(n_layer=1, n_head=n_head, n_embd=n_embd, block_size=64)


def save(model, tokenizer, out):
    """Saves a model without trainer state as step 1 of the run `out` and returns the step folder."""
    defaults = dataclasses.asdict(SamplingParams())
    files = {OPTIMIZER: {}, STATE: {}}
    return save_checkpoint(out, 1, model, tokenizer, files, defaults, {"dataset": {"train": []}})


def load_transformers():
    """Returns the module; skips the test where it is not installed."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    return transformers


def theirs_of(tokenizer, folder, seed=0, **changes):
    """Returns a random GPT2LMHeadModel of transformers, saved in `folder` with its tokenizer."""
    transformers = load_transformers()
    torch.manual_seed(seed)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": tokenizer.vocab_size}
    config = transformers.GPT2Config(**(values | {"bos_token_id": 256, "eos_token_id": 256} | changes))
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model


def load_theirs(folder):
    """Returns the model that transformers reads from a folder."""
    return load_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def change_weights(folder, change):
    """Replaces the tensors of model.safetensors, name -> tensor, by change(tensors)."""
    path = folder / "model.safetensors"
    values = change({name: value.clone() for name, value in load_file(path).items()})
    save_file({name: value.contiguous() for name, value in values.items()}, path, metadata={"format": "pt"})


def pickle_weights(folder, dtype=torch.float32, as_archive=True, files=1):
    """Replaces model.safetensors by what transformers wrote before, one file or shards with an index, with the
    tied head and the masks of attention."""
    tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    context = len(tensors["transformer.wpe.weight"])
    tensors |= {"transformer.h.0.attn.bias": torch.ones(1, 1, context, context, dtype=torch.uint8).tril()}
    tensors |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    names, places = sorted(tensors), {}
    for number in range(files):
        name = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin" if files > 1 else "pytorch_model.bin"
        part = {key: tensors[key] for key in names[number::files]}
        torch.save(part, folder / name, _use_new_zipfile_serialization=as_archive)
        places |= dict.fromkeys(part, name)
    if files > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def change_config(folder, **values):
    """Changes settings in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def assert_same_outputs(ours, theirs, vocab_size):
    """Asserts that the losses at every position and the logits of the last position agree."""
    torch.manual_seed(1)
    ids = torch.randint(0, vocab_size, (2, min(48, ours.config.block_size)))
    logits = theirs(ids).logits[..., :vocab_size].float()
    torch.testing.assert_close(ours.eval()(ids), logits[:, -1], atol=TOLERANCE, rtol=0)
    if logits.shape[-1] == theirs.config.vocab_size:
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
        torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), expected, atol=TOLERANCE, rtol=0)


def flip_a_bit(path):
    """Changes one bit of a file, the same one for the same file name."""
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 1
    path.write_bytes(content)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))
