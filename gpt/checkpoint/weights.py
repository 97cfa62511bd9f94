"""Tables between our names and Hugging Face's GPT-2: weights, config.json, generation_config.json; and the hub."""

import hashlib
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gpt.device import empty_together
from gpt.errors import InputError, IntegrityError, ResourceError
from gpt.files import inside, read_json, sha256_of
from gpt.model import GPT, ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z")
HUB_FILES = ["*.safetensors", INDEX, "config.json", "generation_config.json", *TOKENIZER_FILES]
WANTED = {"allow_patterns": HUB_FILES, "ignore_patterns": ["*/*"]}  # to the hub's `*` a slash is a character too
HUB_SECONDS = 10  # for the hub's first answer

OUTER = {"token": "wte", "position": "wpe", "ln_f": "ln_f"}
INNER = {
    "ln_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
TRANSPOSED = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")  # GPT-2 stores (in, out)
FLOATS = ("F32", "F16", "BF16", "F64")
BUFFERS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks that old files carry

# What config.json may say that would make another model of it, and the value that is GPT-2's.
ONLY = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}
SAME_AS = {("activation_function", "gelu_pytorch_tanh"): "gelu_new"}


def their_name(name):
    """Our parameter's name in a Hugging Face file, without the prefix: "blocks.3.mlp.fc.bias" ->
    "h.3.mlp.c_fc.bias"."""
    path, kind = name.rsplit(".", 1)
    if path in OUTER:
        return f"{OUTER[path]}.{kind}"
    _, index, inner = path.split(".", 2)
    return f"h.{index}.{INNER[inner]}.{kind}"


def weights_of(model):
    """The model's weights as Hugging Face stores them: name -> fp32 CPU tensor, the padding of the vocabulary left
    out."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", torch.float32)
        if name == "token.weight":
            value = value[: model.vocab_size]
        found[PREFIX + their_name(name)] = (value.t() if name.endswith(TRANSPOSED) else value).contiguous()
    return found


def weights_hash(folder):
    """sha256 over the weight files of a folder, to record which base a fine-tune started from."""
    digests = "".join(sha256_of(path) for path in StoredWeights(folder).paths())
    return hashlib.sha256(digests.encode()).hexdigest()


def check_weights(model, stored):
    """Raise IntegrityError, naming up to five, for keys that `model` lacks, needs or wants in another shape. Values are
    not read, so the model may be on the meta device."""
    wanted = {their_name(name): (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    problems = [f"{name} is missing" for name in wanted if name not in stored.files]
    problems += [f"{name} is unknown" for name in stored.files if name not in wanted and name != "lm_head.weight"]
    for name, (ours, shape) in wanted.items():
        if name not in stored.files:
            continue
        shape = (model.vocab_size, *shape[1:]) if ours == "token.weight" else shape
        shape = shape[::-1] if ours.endswith(TRANSPOSED) else shape
        stored_shape, dtype = stored.describe(name)
        if stored_shape != shape:
            problems.append(f"{name} is {stored_shape}, model wants {shape}")
        if dtype not in FLOATS:
            problems.append(f"{name} is of type {dtype}; needs one of {', '.join(FLOATS)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError(f"weights do not fit: {stored.folder}: {'; '.join(problems[:5])}{more}")


def read_weight(stored, ours, made):
    """`made`, filled with the stored tensor for our parameter of that name, converted as it is read: no whole model is
    there in another type. Raises IntegrityError for values that are not finite."""
    name = their_name(ours)
    value = checked = stored.read(name)
    if ours.endswith(TRANSPOSED):
        checked = value.to(made.dtype)  # first: torch transposes fast only within one type
        made.copy_(checked.to(made.device).t())
    else:
        made[: len(value)] = value
        made[len(value) :] = 0
    if not (all_finite(checked) or all_finite(value)):  # a value too large for `dtype` is no fault of the file
        raise IntegrityError(f"non-finite values in {name}: {stored.folder}; use another checkpoint")
    return made


def all_finite(value):
    """Whether every element of `value` is. A maximum passes NaN on, and takes a tenth of the time of isfinite."""
    return bool(torch.stack(value.aminmax()).isfinite().all())


class StoredWeights:
    """The tensors of a Hugging Face folder, one file or sharded, under names without prefix and without mask
    buffers."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = {}  # name -> (open file, name in it)
        for path in self.paths():
            file = opened(path)
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                plain = name.removeprefix(PREFIX)
                if plain in self.files:
                    raise IntegrityError(f"{path}: {plain} is there twice; restore the folder")
                if not BUFFERS.match(plain):
                    self.files[plain] = (file, name)
        if "lm_head.weight" in self.files:  # a tied weight may be stored under either name
            self.files.setdefault("wte.weight", self.files["lm_head.weight"])

    def paths(self):
        if (self.folder / WEIGHTS).exists():
            return [self.folder / WEIGHTS]
        if (self.folder / INDEX).exists():
            try:
                names = sorted(set(read_json(self.folder / INDEX)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError):
                raise IntegrityError(f"{self.folder / INDEX}: not a weight index; restore it") from None
            return [inside(self.folder, name) for name in names]
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            raise InputError(
                f"{self.folder}: only pickle weights, which can run code when loaded; convert them to {WEIGHTS} first"
            )
        raise InputError(f"{self.folder}: no {WEIGHTS} (pickle weights are never read); give a GPT-2 checkpoint folder")

    def describe(self, name):
        """(shape, type as safetensors calls it) of a tensor."""
        file, stored_name = self.files[name]
        part = file.get_slice(stored_name)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name):
        file, stored_name = self.files[name]
        return file.get_tensor(stored_name).float()

    def check_head(self):
        """Raise InputError unless the head is the embedding."""
        if "lm_head.weight" in self.files and not torch.equal(self.read("lm_head.weight"), self.read("wte.weight")):
            raise InputError(f"{self.folder}: untied head (lm_head.weight differs from wte.weight); not a GPT-2")


def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError):
        raise IntegrityError(f"{path}: not a safetensors file; restore it or use another checkpoint") from None
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing; restore it or use another checkpoint") from None
    except OSError as error:
        raise ResourceError(f"{path}: {error}; make it readable") from None


# ---- config.json


def config_json(config, vocab_size, eot):
    """The content of config.json for a model of ours."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **ONLY,
        "vocab_size": vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # llama.cpp's converter reads this one
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "pad_token_id": eot,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def generation_json(eot, sampling):
    """The content of generation_config.json: `sampling` holds our defaults under names both sides share."""
    return {"do_sample": True, **sampling, "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}


def read_config(folder):
    """(ModelConfig, vocab_size) of a GPT-2 folder. Raises InputError naming what would make another model of it."""
    values = read_json(Path(folder) / "config.json")
    if values is None:
        raise InputError(f"{folder}: no config.json; give a GPT-2 checkpoint folder, a run folder or a hub name")
    for name, wanted in ONLY.items():
        value = values.get(name, wanted)
        if SAME_AS.get((name, str(value)), value) != wanted:
            raise InputError(f"{folder}: {name} is {value!r}, GPT-2 has {wanted!r}; this model cannot be used here")
    try:
        config = ModelConfig(
            n_layer=int(values["n_layer"]),
            n_head=int(values["n_head"]),
            n_embd=int(values["n_embd"]),
            block_size=int(values.get("n_positions", values.get("n_ctx"))),
            dropout=float(values.get("resid_pdrop", 0.0)),
        )
        vocab_size = int(values["vocab_size"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{folder}/config.json: not a GPT-2 configuration ({error!r}); restore it") from None
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(
            f"{folder}: n_inner is {values['n_inner']}, GPT-2 has 4 * n_embd; this model cannot be used here"
        )
    return config, vocab_size


@torch.no_grad()
def load_model(folder, dtype=torch.float32, device="cpu", together=False):
    """The GPT of a Hugging Face GPT-2 folder, its weights of type `dtype` on `device`; on a CPU `together` lays them
    side by side in memory that is fast to read, and that is given back only as a whole."""
    config, vocab_size = read_config(folder)
    stored = StoredWeights(folder)
    if config.n_layer > len(stored.files):  # a number that would take hours to build
        raise IntegrityError(f"{folder}: config.json has {config.n_layer} layers, the weights fewer; restore it")
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    check_weights(model, stored)
    stored.check_head()
    shapes = {ours: tuple(parameter.shape) for ours, parameter in model.named_parameters()}
    places = empty_together(shapes.values(), dtype) if together and torch.device(device).type == "cpu" else None
    places = places or (torch.empty(shape, dtype=dtype, device=device) for shape in shapes.values())
    weights = {ours: read_weight(stored, ours, made) for ours, made in zip(shapes, places, strict=True)}
    model.load_state_dict(weights, assign=True)  # Module.to_empty would import sympy, which takes half a second
    return model.eval()


# ---- the hub


def fetch_from_hub(name):
    """The local folder of a hub model, downloaded over https into Hugging Face's cache, or found there."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    unknown = InputError(f"{name}: neither a folder here nor a model on the hub; check the name")
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)  # snapshot_download alone would wait for a silent hub for ever
        return Path(snapshot_download(name, **WANTED, etag_timeout=HUB_SECONDS))
    except HFValidationError:
        raise unknown from None
    except (HTTPError, OSError) as error:
        problem = error
    try:
        return Path(snapshot_download(name, **WANTED, local_files_only=True))
    except OSError:
        if isinstance(problem, RepositoryNotFoundError):
            raise unknown from None
        reason = str(problem).split("\n")[0]
        raise ResourceError(f"{name}: not in the cache, and the hub cannot be reached ({reason}); go online") from None
