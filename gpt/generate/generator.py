"""Prompts -> text: TextGenerator, a model with its tokenizer."""

import contextlib
import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.checkpoint.read import Loaded, load_pretrained
from gpt.config import fields, make_config, refuse
from gpt.config.names import suggestion
from gpt.device import free_memory, pick_device, set_precision, use_one_thread_after_fork
from gpt.errors import InputError, NonFiniteError, ResourceError, printable
from gpt.generate.backend import BACKENDS, Backend, pick_backend
from gpt.generate.decode import Decoder
from gpt.generate.sampling import SamplingParams
from gpt.generate.score import Score, score_text
from gpt.generate.sequence import Completion, Events, GenerationParams, Sequence, in_order
from gpt.generate.step import row_bytes
from gpt.kernels.select import decode_library, note_slow_int8, pick_decode_dtype, pick_dtype
from gpt.model import GPT, ModelConfig
from gpt.quantize import to_int8
from gpt.text.examples import Turns, encode_chat, require_template
from gpt.text.tokenizer import Tokenizer

MOST_ROWS = {"cpu": 8, "mps": 16, "cuda": 64}  # row slots if the user sets no `rows`: more slots gain little
CACHE_SHARE = 0.5  # share of the free memory that the caches of the rows may fill
PromptIds = Iterable[int | str] | None  # None: 1, 2, …


class TextGenerator:
    """A model with its tokenizer. `defaults` (name -> value, as in generation_config.json) replace the defaults of
    SamplingParams; `backend` is a key of BACKENDS or "auto". A process that is forked later generates with one thread,
    unless the model is on a GPU: CUDA does not work there."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, defaults: dict[str, Any] | None = None, backend: str = "auto"):
        use_one_thread_after_fork()
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        known = fields(SamplingParams)
        ours = {"no_repeat_ngram_size": "no_repeat_ngram"}  # name in transformers -> name here
        given = {ours.get(name, name): value for name, value in (defaults or {}).items()}
        usable = {name: value for name, value in given.items() if name in known}
        self.defaults = {name: value for name, value in usable.items() if type(value) in (int, known[name].type)}
        self.backends: dict[str, Backend] = {}  # name -> back end made so far, for the weights of `versions`
        self.versions: list[tuple] = []
        self.idle_decoder: Decoder | None = None  # the last Decoder, for its cache and its captured steps

    @classmethod
    @torch.inference_mode(False)  # weights loaded in inference mode could not be trained later
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        backend: str = "auto",
        expected: list[GenerationParams] | None = None,
    ) -> "TextGenerator":
        """Returns the TextGenerator of a checkpoint folder, run folder or hub name. The other arguments take the values
        of the options of sample.py. `expected`, the settings of the prompts to come, decide on a CPU which precision
        "auto" is, and whether to wait for a build of the C++ library. Raises InputError for an unknown name or device,
        IntegrityError for a damaged checkpoint."""
        on_device, int8 = pick_device(device), quantize == "int8"
        rows, steps = rows_and_steps(expected or [], MOST_ROWS["cpu"])

        def precision(config: ModelConfig, vocab_size: int) -> torch.dtype:
            if dtype != "auto" or on_device.type != "cpu":
                return pick_dtype(dtype, on_device)
            library = decode_library(backend, steps, config, vocab_size)
            return pick_decode_dtype(config, vocab_size, int8, rows, library)

        load: Callable[..., Loaded] = load_int8 if int8 else functools.partial(load_pretrained, together=True)
        model, tokenizer, defaults = load(path, precision, on_device)
        if int8 and on_device.type == "cpu":
            note_slow_int8(model, rows, decode_library(backend, steps, model.config, model.vocab_size))
        set_precision(model.dtype)
        return cls(model, tokenizer, defaults, backend)

    def generate(
        self, prompts: str | Iterable[str], prompt_ids: PromptIds = None, **settings: Any
    ) -> list[list[Completion]]:
        """Returns for each prompt (a string or several) a list of `num_samples` Completions.

        `settings` are fields of GenerationParams and SamplingParams: generate(["Once upon"], max_new_tokens=100,
        top_p=0.95). `prompt_ids`, a number or string per prompt (default: 1, 2, …), give prompts different random
        numbers. Raises InputError for bad settings or a prompt longer than the context, NonFiniteError for damaged
        weights, ResourceError if memory runs out."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self.params(**settings)
        events = in_order(self.events(prompts, [params] * len(prompts), prompt_ids))
        completions = [sequence.completion for sequence, _ in events if sequence.finish_reason]
        return [completions[i : i + params.num_samples] for i in range(0, len(completions), params.num_samples)]

    def continue_ids(self, prompts: list[list[int]], **settings: Any) -> list[Completion]:
        """Returns the Completion of each prompt, which is given as ids that fit into the context, at least one.
        `settings` are those of `generate`, without `num_samples`."""
        params = [self.params(**settings)] * len(prompts)
        backend, rows = self.pick(params)
        numbers: list[int | str] = list(range(1, len(prompts) + 1))
        sequences = self.sequences([np.array(ids) for ids in prompts], numbers, params, skip=0)
        with allow_nondeterminism():
            events = in_order(self.decode(sequences, backend, rows, report=None))
            return [sequence.completion for sequence, _ in events if sequence.finish_reason]

    def stream(self, prompt: str, prompt_id: int | str = 1, **settings: Any) -> Iterator[str]:
        """Returns an iterator over the pieces of one text, each as soon as no later token can change it; the joined
        pieces are the text. The arguments are those of `generate`."""
        params = self.params(**settings)
        if params.num_samples != 1:
            raise InputError(f"num_samples {params.num_samples}: a stream is one text; use generate")
        events = self.events([prompt], [params], [prompt_id])
        return (piece for _, piece in events if piece)

    def score(self, text: str, stride: int = 0) -> Score:
        """Returns how well the model predicts `text`: see `score_text`."""
        return score_text(self.model, self.tokenizer, text, stride)

    def params(self, **settings: Any) -> GenerationParams:
        """Returns the GenerationParams with `settings` over the checkpoint's defaults; draws a seed if none is set.
        Raises InputError for an unknown setting or a bad value."""
        known = fields(GenerationParams)
        for name in settings.keys() - known.keys():
            raise InputError(f"unknown setting {name}; {suggestion(name, known)}")
        if isinstance(settings.get("stop"), str):
            settings["stop"] = (settings["stop"],)
        params = make_config(GenerationParams, self.defaults, settings)
        refuse(params.problems())
        return params if params.seed is not None else dataclasses.replace(params, seed=secrets.randbelow(1 << 32))

    def events(
        self,
        prompts: Iterable[str | Turns],
        params: list[GenerationParams],
        prompt_ids: PromptIds = None,
        skip: int = 0,
    ) -> Events:
        """Returns an iterator over events (Sequence, piece of text), in the order in which tokens are chosen; generate,
        stream and sample.py use it. A prompt is a text, or the turns of a conversation that the assistant answers.
        `params` has an entry per prompt; `rows` is read from the first. Leaves out the first `skip` texts. Raises
        errors in settings and prints notes about the back end at the call, not during the iteration, so a caller can
        print the prompt in between."""
        prompts = list(prompts)
        ids = list(range(1, len(prompts) + 1) if prompt_ids is None else prompt_ids)
        if len(ids) != len(prompts):
            raise InputError(f"prompt_ids: {len(ids)} for {len(prompts)} prompts; give one for each")
        names = [f"prompt {prompt_id}" if len(prompts) > 1 else "prompt" for prompt_id in ids]
        encoded = [self.encode(*arguments) for arguments in zip(prompts, names, params, strict=True)]
        report = max((own.top_logprobs for own in params if own.logprobs or own.top_logprobs), default=None)
        backend, rows = self.pick(params)
        self.get_backend(backend)  # now, for its notes
        return self.decode(self.sequences(encoded, ids, params, skip), backend, rows, report)

    def encode(self, prompt: str | Turns, name: str, params: GenerationParams) -> np.ndarray:
        """Returns the ids of a prompt, int32 (T,); end-of-text alone for an empty one. If a prompt is longer than the
        context, keeps its last ids if `params.truncate`, else raises InputError, which calls it `name`. Also raises
        InputError for a conversation if the model has not learned from messages, or if its chat template refuses it."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt, params.allow_special)
        else:
            require_template(self.tokenizer, name)
            try:
                ids = encode_chat(prompt, self.tokenizer)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        context = self.model.config.block_size
        if len(ids) > context and not params.truncate:
            raise InputError(f"{name} has {len(ids)} tokens, context is {context}; use --truncate")
        return np.array(ids[-context:], dtype=np.int32)

    def sequences(
        self, prompts: list[np.ndarray], prompt_ids: list[int | str], params: list[GenerationParams], skip: int
    ) -> Iterator[Sequence]:
        """Yields the Sequences of all samples of all prompts, without the first `skip`."""
        number = -skip
        for prompt_number, (prompt, prompt_id, own) in enumerate(zip(prompts, prompt_ids, params, strict=True)):
            ids = prompt.tolist()
            for sample in range(own.num_samples):
                if number >= 0:
                    yield Sequence(number, prompt_number, ids, prompt_id, sample, own, self.tokenizer)
                number += 1

    # ---- back end, rows and memory

    def pick(self, params: list[GenerationParams]) -> tuple[str, int]:
        """Returns the name of the back end and the number of rows for prompts with these GenerationParams. Raises
        InputError for a back end that cannot run here."""
        rows, steps = rows_and_steps(params, self.most_rows())
        return pick_backend(self.backend, self.model, steps, rows), rows

    def most_rows(self) -> int:
        """Returns as many rows as gain speed on this device and fit into CACHE_SHARE of the free memory."""
        fitting = int(free_memory(self.model.device) * CACHE_SHARE) // row_bytes(self.model)
        return min(MOST_ROWS[self.model.device.type], fitting)

    def decode(self, sequences: Iterable[Sequence], backend: str, rows: int, report: int | None) -> Events:
        """Generates the sequences and yields their events. Meanwhile no other call uses the same Decoder; afterwards it
        is idle."""
        decoder = self.take_decoder(backend, rows)
        try:
            yield from decoder.events(sequences, report)
        finally:
            self.idle_decoder = decoder

    @torch.inference_mode(False)  # its tensors outlive the call, so they must not be inference tensors
    def get_backend(self, name: str) -> Backend:
        """Returns the back end for the weights as they are now: a new one after every change of them."""
        if weight_versions(self.model) != self.versions:  # back ends keep addresses and copies of the weights
            self.backends.clear()
        if name not in self.backends:
            self.backends[name] = BACKENDS[name](self.model)  # may move the weights
            self.versions = weight_versions(self.model)
        return self.backends[name]

    @torch.inference_mode(False)  # as in get_backend
    def take_decoder(self, name: str, rows: int) -> Decoder:
        """Returns a Decoder that is not in use: the idle one if it fits, else a new one."""
        backend, decoder = self.get_backend(name), self.idle_decoder
        self.idle_decoder = None
        if decoder and decoder.step.backend is backend and len(decoder.step) == backend.slots(rows):
            return decoder
        del decoder  # its cache would take the memory that the new cache needs
        eot, *stops = self.tokenizer.stops
        return Decoder(backend, rows, eot, self.unused_ids(), stops)

    def unused_ids(self) -> list[int]:
        """Returns the ids that are no token: they must never be chosen."""
        special = set(self.tokenizer.encoding._special_tokens.values())
        return [i for i in np.flatnonzero(self.tokenizer.byte_lengths() == 0).tolist() if i not in special]


def load_int8(path: str | Path, choose: Callable[[ModelConfig, int], torch.dtype], device: torch.device) -> Loaded:
    """Returns load_pretrained(path) with int8 matrices; everything else has the type that `choose` returns."""
    model, tokenizer, defaults = load_pretrained(path, device=device)
    return to_int8(model, choose(model.config, model.vocab_size)), tokenizer, defaults


def rows_and_steps(params: list[GenerationParams], most_rows: int) -> tuple[int, int]:
    """Returns, for prompts with these settings, the number of rows, at most `most_rows` unless the settings name
    another, and about how many decode steps their texts take."""
    texts = sum(own.num_samples for own in params)
    rows = (params[0].rows if params else 0) or max(1, min(texts, most_rows))
    return rows, sum(own.num_samples * own.max_new_tokens for own in params) // rows


def sample_line(model: GPT, tokenizer: Tokenizer, prompt: list[int], tokens: int, seed: int, width: int) -> str:
    """Returns what a model in training writes after the ids `prompt`, in one line of at most `width` characters. Never
    fails for lack of memory or because of the weights: then returns the reason."""
    generator = TextGenerator(model, tokenizer, backend="eager")  # it needs no second copy of the weights
    try:
        [completion] = generator.continue_ids([prompt], max_new_tokens=tokens, seed=seed)
    except (ResourceError, NonFiniteError) as error:
        return f"({error})"
    return printable(" ".join(completion.text.split()), keep="")[:width]


@contextlib.contextmanager
def allow_nondeterminism() -> Iterator[None]:
    """Allows operations that are not deterministic within this context: on a GPU, sampling uses some."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def weight_versions(model: GPT) -> list[tuple]:
    """Returns a value that differs after every change of the weights: address, type, and the number of changes in place
    of each tensor. torch does not number the changes of tensors that were made in inference mode."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors]
