"""Makes random GPT-2 weights, once for each size, and converts them to the format of each other program."""

import functools
import json
import shutil
import subprocess
from pathlib import Path

SIZES = {  # layers, heads, width
    "tiny": (2, 2, 64),  # to try the programs out
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
LIVELY = 4  # factor, see `enliven`
VOCABULARY = 50257  # GPT-2's


def make_weights(work: Path, size: str, seed: int = 0) -> Path:
    """Returns the Hugging Face GPT-2 folder `work/<size>`, its weights drawn from `seed`; makes it if missing."""
    folder = Path(work) / size
    if (folder / "config.json").exists():
        return folder
    import torch

    from gpt.checkpoint.weights import weights_of
    from gpt.checkpoint.write import write_model
    from gpt.model import GPT, ModelConfig
    from gpt.text.tokenizer import load_tokenizer

    layers, heads, width = SIZES[size]
    tokenizer = load_tokenizer("byte" if size == "tiny" else "gpt2")
    torch.manual_seed(seed)
    model = GPT(ModelConfig(n_layer=layers, n_head=heads, n_embd=width), tokenizer.vocab_size)
    enliven(model)
    with Whole(folder) as unfinished:
        unfinished.mkdir(parents=True)
        write_model(unfinished, weights_of(model), model, tokenizer, {})
    return folder


def fresh_weights(work: Path, size: str, block_size: int, seed: int = 0) -> Path:
    """Returns the folder `work/<size>-fresh-<block_size>` of an untrained model; makes it if missing. The model has
    GPT-2's vocabulary, the folder has no tokenizer files."""
    folder = Path(work) / f"{size}-fresh-{block_size}"
    if (folder / "config.json").exists():
        return folder
    import torch

    from gpt.model import GPT, ModelConfig

    layers, heads, width = SIZES[size]
    torch.manual_seed(seed)
    model = GPT(ModelConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=block_size), VOCABULARY)
    with Whole(folder) as unfinished:
        write_weights(unfinished, model)
    return folder


def write_weights(folder: Path, model) -> None:
    """Writes what gpt.checkpoint.weights.load_model needs into the new `folder`: the weights and config.json."""
    from safetensors.torch import save_file

    from gpt.checkpoint.weights import WEIGHTS, config_json, weights_of

    folder.mkdir(parents=True)
    save_file(weights_of(model), folder / WEIGHTS, metadata={"format": "pt"})
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), model.vocab_size - 1)
    config = config_json(model.config, model.vocab_size, ids)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def enliven(model) -> None:
    """Scales weights of an untrained model, so that its logits vary like those of a trained one (standard deviation 2
    instead of 0.5) and depend on more than the last token. Otherwise every greedy text repeats one token, and comparing
    texts shows nothing."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or name in ("ln_f.weight", "position.weight"):
                parameter *= LIVELY


class Whole:
    """A context that gives a temporary path, and renames it to `target` if nothing was raised."""

    def __init__(self, target):
        self.target, self.unfinished = target, target.with_name(target.name + ".unfinished")

    def __enter__(self):
        remove(self.unfinished)
        return self.unfinished

    def __exit__(self, kind, _error, _trace):
        if kind is None:
            self.unfinished.replace(self.target)
        else:
            remove(self.unfinished)


def remove(path: Path) -> None:
    """Removes a file or a folder; a missing path is a no-op."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prompts_of(folder: Path, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Returns `rows` lists of `length` random ids. Each id is a space and a word, so that the text of a list is split
    into the same ids again: programs may take ids or text."""
    import numpy as np

    tokenizer, words = llama_tokenizer(folder)
    chosen = np.random.default_rng(seed).choice(words, (rows, length)).tolist()
    assert all(tokenizer.encode(tokenizer.decode(row)) == row for row in chosen)
    return chosen


@functools.cache
def llama_tokenizer(folder):
    """Returns the tokenizer of a folder and the ids of its words."""
    from gpt.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ranks = tokenizer.encoding._mergeable_ranks
    words = sorted(rank for token, rank in ranks.items() if token[:1] == b" " and token[1:].isalpha())
    return tokenizer, words or sorted(rank for token, rank in ranks.items() if token.isalpha())  # a byte tokenizer


# ---- formats of other programs


def for_ctranslate2(folder: Path) -> Path:
    """Returns the folder converted for CTranslate2; converts it if missing."""
    target = folder.with_name(f"{folder.name}-ctranslate2")
    if not target.exists():
        from ctranslate2.converters import TransformersConverter

        with Whole(target) as unfinished:
            TransformersConverter(str(folder)).convert(str(unfinished))
    return target


def for_openvino(folder: Path, precision: str, exporter: str = "optimum-cli") -> Path:
    """Returns the folder converted for OpenVINO; converts it if missing. `exporter` is the path of
    optimum-intel's program, which may be installed in another environment."""
    target = folder.with_name(f"{folder.name}-openvino-{precision}")
    if not target.exists():
        words = "export openvino --task text-generation-with-past --weight-format"
        with Whole(target) as unfinished:
            command = [exporter, *words.split(), precision, "--model", str(folder), str(unfinished)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def for_llamacpp(folder: Path, precision: str) -> Path:
    """Returns a GGUF file; writes it if missing. Matrices are in `precision` ("f32", "f16", "q8_0"), vectors and
    positions in F32, as llama.cpp's own converter leaves them."""
    target = folder.with_name(f"{folder.name}-{precision}.gguf")
    if not target.exists():
        from gpt.checkpoint.read import load_pretrained
        from gpt.report.gguf_file import KINDS, llama_tokenizer, write_gguf

        model, tokenizer, _ = load_pretrained(folder)
        write_gguf(target, model, tokenizer, llama_tokenizer(tokenizer), KINDS[precision], license_name="")
    return target
