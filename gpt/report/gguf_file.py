"""Writes a GPT-2 as a GGUF file, which llama.cpp reads, through the package gguf.

llama.cpp stores a matrix by rows of outputs, (out, in), as this program holds it; the head is the embedding. Its
tokenizer is the same byte-level BPE: the spelled tokens by their ids, the list of merges, and the name of a pattern
that it knows. The package leaves out empty arrays, which llama.cpp then misses, so a tokenizer without merges gets one
that can never apply."""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gpt.errors import InputError, IntegrityError, ResourceError, note
from gpt.files import is_folder, sync_folder
from gpt.model import GPT
from gpt.text.huggingface import pattern_name, spelled
from gpt.text.tokenizer import PROBES, Tokenizer

INSTALL = 'pip install -c constraints.txt -e ".[export]" brings the package gguf'
PRE_TOKENIZERS = {"gpt2": "gpt-2"}  # the known patterns -> llama.cpp's name of the same pattern
NAMES = {  # our name of a tensor -> llama.cpp's
    "token.": "token_embd.",
    "position.": "position_embd.",
    "blocks.": "blk.",
    "ln_f.": "output_norm.",
    "ln_1.": "attn_norm.",
    "ln_2.": "ffn_norm.",
    "attn.qkv.": "attn_qkv.",
    "attn.proj.": "attn_output.",
    "mlp.fc.": "ffn_up.",
    "mlp.proj.": "ffn_down.",
}
KINDS = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
Q8_ROW = 32  # weights in a block of Q8_0; a row is a whole number of blocks
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # Q8_0: whole numbers up to 127, times a scale in f16


@dataclass(frozen=True)
class LlamaTokenizer:
    """A tokenizer as llama.cpp stores it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str


def load_package() -> Any:
    """Returns the package gguf. Raises InputError if it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"--gguf: the package gguf is missing; {INSTALL}") from None
    return gguf


def check_gguf_target(path: Path, new_folder: str = "") -> None:
    """Raises InputError unless the package gguf is installed, and `path` can be a new file or is a GGUF file. It may
    lie in `new_folder`, a folder that is created before the file."""
    load_package()
    within = bool(new_folder) and os.path.abspath(path.parent) == os.path.abspath(new_folder)
    if is_folder(path) or not (within or is_folder(path.parent)):
        raise InputError(f"{path}: must be a file in an existing folder; give another --gguf")
    if os.path.lexists(path) and not may_be_replaced(path):
        raise InputError(f"{path}: another kind of file; give another --gguf")


def may_be_replaced(path: Path) -> bool:
    """Returns whether `path` is a GGUF file or an empty file, and no device, pipe, or link that leads nowhere."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"GGUF", b"")
    except OSError:
        return False


# ---- the tokenizer


def llama_tokenizer(tokenizer: Tokenizer) -> LlamaTokenizer:
    """Returns a tokenizer as llama.cpp stores it. Raises InputError if llama.cpp would split text differently."""
    stored = json.loads(tokenizer.huggingface_files[0])["model"]
    known = pattern_name(tokenizer.pattern)
    if known not in PRE_TOKENIZERS:
        raise unsupported(tokenizer, f"the pattern of {known}" if known else "a pattern that llama.cpp lacks")
    if stored["ignore_merges"]:
        raise unsupported(tokenizer, "ranks that are no list of merges")
    tokens = [f"[unused {rank}]" for rank in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    hidden = {text: tokenizer.encoding._special_tokens[text] for text in tokenizer.additions.hidden}
    ordinary = {spelled(token): rank for token, rank in tokenizer.encoding._mergeable_ranks.items()}
    for kind, ids in (
        (NORMAL, ordinary),
        (UNUSED, hidden),
        (CONTROL, tokenizer.special_tokens),
        (USER_DEFINED, tokenizer.additions.ordinary),
    ):
        for text, rank in ids.items():
            tokens[rank], types[rank] = text, kind
    if len(set(tokens)) < len(tokens):
        raise unsupported(tokenizer, "two tokens of one spelling")
    end = tokens[tokenizer.eot]
    return LlamaTokenizer(tokens, types, stored["merges"] or [f"{end} {end}"], PRE_TOKENIZERS[known])


def unsupported(tokenizer: Tokenizer, what: str) -> InputError:
    return InputError(f"--gguf: tokenizer {tokenizer.name} has {what}; give DIR alone, for other programs")


def add_tokenizer(writer: Any, llama: LlamaTokenizer, tokenizer: Tokenizer) -> None:
    """Adds a tokenizer to a GGUFWriter. llama.cpp has three places for ids that end a text; warns about more."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(llama.pre_tokenizer)
    writer.add_token_list(llama.tokens)
    writer.add_token_types(llama.types)
    writer.add_token_merges(llama.merges)
    ids = tokenizer.role_ids
    ends = ids["eos_token_id"]
    for name, rank in zip(("eos", "eot", "eom"), ends, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", rank)
    if len(ends) > 3:
        note("warning", f"llama.cpp ends a text at three ids; it will write on after {ends[3:]}")
    begin = tokenizer.eot if tokenizer.additions.begins else ids["bos_token_id"]
    writer.add_bos_token_id(begin)
    writer.add_pad_token_id(ids["pad_token_id"])
    writer.add_add_bos_token(tokenizer.additions.begins)
    writer.add_add_eos_token(False)
    if tokenizer.additions.chat_template:
        writer.add_chat_template(tokenizer.additions.chat_template)


# ---- the weights


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name of a parameter: gguf_name("blocks.3.mlp.fc.bias") == "blk.3.ffn_up.bias"."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def typed_parameters(model: GPT, kind: str) -> Iterator[tuple[str, Tensor, Any]]:
    """Yields (our name, values, type in the file) of each parameter. `kind` is the type of the matrices: Q8_0 becomes
    F16 where a row is no multiple of Q8_ROW. Vectors and the positions are F32, as in llama.cpp's converter."""
    types = load_package().GGMLQuantizationType
    for name, parameter in model.named_parameters():
        value: Tensor = parameter.detach()
        if name == "token.weight":
            value = value[: model.vocab_size]
        is_vector = value.dim() == 1 or name == "position.weight"
        fits = kind != "Q8_0" or value.shape[-1] % Q8_ROW == 0
        yield name, value, types.F32 if is_vector else types[kind] if fits else types.F16


def check_range(model: GPT, kind: str) -> None:
    """Raises InputError for a weight that is too large for its type in the file."""
    for name, value, chosen in typed_parameters(model, kind):
        if value.abs().max() > LARGEST.get(chosen.name, math.inf):
            raise InputError(f"--gguf: a weight of {name} is too large for {chosen.name.lower()}; use --type f32")


def tensors_of(model: GPT, kind: str) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Yields (llama.cpp's name, values, type) of each tensor in the file."""
    quantize = load_package().quants.quantize
    for name, value, chosen in typed_parameters(model, kind):
        yield gguf_name(name), quantize(value.float().cpu().numpy(), chosen), chosen


# ---- the file


def write_gguf(
    path: Path, model: GPT, tokenizer: Tokenizer, llama: LlamaTokenizer, kind: tuple[str, str], license_name: str
) -> None:
    """Writes the file `path`, whole or not at all, and reads it back; replaces an earlier one. `kind` is an entry of
    KINDS, which `check_range` accepts for this model. Raises IntegrityError if the file does not read back as it was
    written, InputError if llama.cpp splits text differently, ResourceError if writing fails."""
    package, temporary = load_package(), path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            writer = package.GGUFWriter(temporary, "gpt2")
            add_settings(writer, model, path.stem, package.LlamaFileType[kind[1]], license_name)
            add_tokenizer(writer, llama, tokenizer)
            write_tensors(writer, model, kind[0])
            check_gguf(temporary, model, llama, kind[0])
            check_ids(temporary, tokenizer)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(f"{path}: writing failed: {reason}; free some space or make it writable") from None
    note("info", f"{path}: {path.stat().st_size / 1e6:,.1f} MB in {kind[0].lower()}, for llama.cpp")


def add_settings(writer: Any, model: GPT, name: str, file_type: int, license_name: str) -> None:
    """Adds the settings of a model to a GGUFWriter."""
    config = model.config
    writer.add_name(name)
    writer.add_license(license_name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(load_package().GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)


def write_tensors(writer: Any, model: GPT, kind: str) -> None:
    """Writes the file of a GGUFWriter: first the sizes of all tensors, then the tensors, one at a time in memory."""
    try:
        for name, values, chosen in tensors_of(model, kind):
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values, _ in tensors_of(model, kind):
            writer.write_tensor_data(values)
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
    finally:
        writer.close()


def check_gguf(path: Path, model: GPT, llama: LlamaTokenizer, kind: str) -> None:
    """Raises IntegrityError unless the file reads back with the same tokenizer and tensors."""
    reader = load_package().GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    problems = [
        name
        for name, values, chosen in tensors_of(model, kind)
        if stored[name].tensor_type != chosen or not np.array_equal(stored[name].data, values)
    ]
    for key, expected in (("tokens", llama.tokens), ("token_type", llama.types), ("merges", llama.merges)):
        if reader.fields[f"tokenizer.ggml.{key}"].contents() != expected:
            problems.append(key)
    if problems:
        raise IntegrityError(f"{path}: {problems[0]} does not read back as it was written; try another disk")


def check_ids(path: Path, tokenizer: Tokenizer) -> None:
    """Loads the file in llama.cpp, where llama-cpp-python is installed. Raises IntegrityError if that fails, InputError
    if it gives other ids for one of PROBES. Only warns if it cannot read the chat template."""
    try:
        import llama_cpp
        from jinja2 import TemplateError  # it reads templates with Jinja, llama.cpp's own programs do not
    except (ImportError, OSError, RuntimeError):  # the last two: its library does not load
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it warns that its smallest context exceeds the model's
            theirs = llama_cpp.Llama(str(path), n_ctx=64, verbose=False)
    except TemplateError as error:
        note("warning", f"llama-cpp-python cannot read the chat template ({error}): its ids were not compared")
        return
    except ValueError as error:
        raise IntegrityError(f"{path}: llama.cpp does not load it ({error}); report it") from None
    for probe in PROBES:
        if theirs.tokenize(probe.encode(), add_bos=False, special=False) != tokenizer.encode(probe):
            raise InputError(
                f"--gguf: llama.cpp splits {probe[:20]!r}… differently from tokenizer {tokenizer.name}; give DIR alone"
            )
