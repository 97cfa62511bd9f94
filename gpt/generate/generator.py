"""Prompts -> text: the settings of a generation, and TextGenerator, which is a model with its tokenizer."""

import dataclasses
import secrets
from dataclasses import dataclass, field

import numpy as np
import torch

from gpt.config import fields, make_config, refuse, suggestion
from gpt.device import free_memory, pick_device, set_precision
from gpt.errors import InputError
from gpt.generate.backend import make_backend, pick_backend
from gpt.generate.decode import Decoder
from gpt.generate.sampling import SamplingParams
from gpt.generate.score import score_text
from gpt.generate.sequence import Sequence
from gpt.generate.step import Report, row_bytes
from gpt.kernels.select import pick_dtype

MOST_ROWS = {"cpu": 8, "mps": 16, "cuda": 64}  # row slots where the user names no number: more gain little
CACHE_SHARE = 0.5  # of the free memory, that their caches may fill


@dataclass(frozen=True)
class GenerationParams:
    """Everything that decides what is generated from a prompt, apart from model, device and precision."""

    max_new_tokens: int = 200
    """tokens to generate after each prompt"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """strings that end the text where they first occur; they are left out of it"""
    ignore_eot: bool = False
    """never choose end-of-text, so that every text gets its full length"""
    num_samples: int = 1
    """texts for each prompt"""
    seed: int | None = None
    """the same seed and settings, --rows, precision and back end among them, give the same text; None draws one"""
    rows: int = 0
    """texts generated side by side, each with its own key-value cache; 0 goes by their number, the device and its free
    memory. Another number may round differently: the same text again needs the same --rows, precision and back end"""
    truncate: bool = False
    """drop the beginning of a prompt that is longer than the context, instead of refusing it"""
    allow_special: bool = False
    """read <|endoftext|> in a prompt as the token, not as text"""
    logprobs: bool = False
    """give the log-probability of each token, in the model's own distribution before any sampling setting"""
    top_logprobs: int = 0
    """give, for each token, the log-probabilities of so many likeliest ones there too; 0 is off"""

    def problems(self):
        """What is wrong with these values, in words; empty if nothing."""
        rules = [
            (self.max_new_tokens >= 0, f"max_new_tokens {self.max_new_tokens} must be 0 or more"),
            (self.num_samples >= 1, f"num_samples {self.num_samples} must be at least 1"),
            (self.rows >= 0, f"rows {self.rows} must be 0 (automatic) or more"),
            (self.seed is None or 0 <= self.seed < 1 << 64, f"seed {self.seed} must be from 0 to 2^64 - 1"),
            (0 <= self.top_logprobs <= 100, f"top_logprobs {self.top_logprobs} must be from 0 (off) to 100"),
            (all(self.stop) and not isinstance(self.stop, str), "stop must be strings that are not empty"),
        ]
        return [text for fine, text in rules if not fine] + self.sampling.problems()


class TextGenerator:
    """A model with its tokenizer. `defaults`, as in generation_config.json, stand in for those of GenerationParams;
    `backend` is one of backend.NAMES."""

    def __init__(self, model, tokenizer, defaults=None, backend="auto"):
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        known = fields(SamplingParams)
        usable = {name: value for name, value in (defaults or {}).items() if name in known}
        self.defaults = {name: value for name, value in usable.items() if type(value) in (int, known[name].type)}
        self.made = {}  # the Backends that were used, by name
        self.weights = None  # those that `made` and `decoders` are for, as weights_now tells them
        self.decoders = {}  # the last Decoder, unless it is in use, by its back end's name and number of rows

    @classmethod
    @torch.inference_mode(False)  # weights loaded within that mode could not be trained later
    def load(cls, path, device="auto", dtype="auto", quantize="none", backend="auto"):
        """The TextGenerator of a checkpoint folder, run folder or hub name, on a device and in a precision by name;
        `quantize` is "none" or "int8"."""
        from gpt.checkpoint.read import load_pretrained  # a model in training is sampled without any of this

        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        set_precision(dtype)
        if quantize == "int8":
            from gpt.quantize import to_int8

            model, tokenizer, defaults = load_pretrained(path, device=device)
            return cls(to_int8(model, dtype), tokenizer, defaults, backend)
        model, tokenizer, defaults = load_pretrained(path, dtype, device, together=True)
        return cls(model, tokenizer, defaults, backend)

    def generate(self, prompts, prompt_ids=None, **settings):
        """For each prompt (a string or several) a list of `num_samples` Completions.

        `settings` are fields of GenerationParams and SamplingParams: generate(["Once upon"], max_new_tokens=100,
        top_p=0.95). `prompt_ids` (numbers or strings; else 1, 2, …) tell the prompts' random numbers apart. Raises
        InputError for bad settings or a prompt longer than the context, NonFiniteError for damaged weights."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = self.params(**settings)
        completions = [[None] * params.num_samples for _ in prompts]
        for sequence, _ in self.run(prompts, params, prompt_ids):
            if sequence.finish_reason:
                completions[sequence.number][sequence.sample] = sequence.completion
        return completions

    def stream(self, prompt, prompt_id=1, **settings):
        """Iterator over the pieces of one completion's text as they become certain; together they are its text."""
        params = self.params(**settings)
        if params.num_samples != 1:
            raise InputError(f"num_samples {params.num_samples}: a stream is one text; use generate")
        events = self.run([prompt], params, [prompt_id])
        return (piece for _, piece in events if piece)

    def score(self, text, stride=0):
        """How well the model predicts `text`: a Score. See score_text."""
        return score_text(self.model, self.tokenizer, text, stride)

    def params(self, **settings):
        """The GenerationParams of these settings over the checkpoint's defaults, with a seed. Raises InputError."""
        known = fields(GenerationParams)
        for name in settings.keys() - known.keys():
            raise InputError(f"unknown setting {name}; {suggestion(name, known)}")
        if isinstance(settings.get("stop"), str):
            settings["stop"] = (settings["stop"],)
        params = make_config(GenerationParams, self.defaults, settings)
        refuse(params.problems())
        return params if params.seed is not None else dataclasses.replace(params, seed=secrets.randbelow(1 << 32))

    def run(self, prompts, params, prompt_ids=None):
        """Returns an iterator over (Sequence, piece of text) in the order in which tokens come: the one loop behind
        generate, stream and sample.py. `params` is for all prompts, or a list with one for each; of these, the first
        gives `rows`. Sequence.number is the place of its prompt. Errors in settings, and notes about the back end, come
        from this call, not from the iterator: a caller can print the prompt in between."""
        prompt_ids = range(1, len(prompts) + 1) if prompt_ids is None else list(prompt_ids)
        params = [params] * len(prompts) if isinstance(params, GenerationParams) else list(params)
        for name, values in (("prompt_ids", prompt_ids), ("params", params)):
            if len(values) != len(prompts):
                raise InputError(f"{name}: {len(values)} for {len(prompts)} prompts; give one for each")
        names = [f"prompt {prompt_id}" if len(prompts) > 1 else "prompt" for prompt_id in prompt_ids]
        encoded = [self.encode(*each) for each in zip(prompts, names, params, strict=True)]
        report = Report(any(p.logprobs for p in params), max((p.top_logprobs for p in params), default=0))
        backend, rows = self.pick(params)
        return self.decoded(self.sequences(encoded, prompt_ids, params), backend, rows, report)

    def pick(self, params):
        """Returns the name of the back end and the number of row slots for these GenerationParams, one for each prompt.
        Raises InputError for a back end that cannot run here."""
        texts = sum(each.num_samples for each in params)
        rows = (params[0].rows if params else 0) or self.fitting_rows(texts)
        steps = sum(each.num_samples * each.max_new_tokens for each in params) // rows
        return pick_backend(self.backend, self.model, steps, rows), rows

    def decoded(self, sequences, backend, rows, report):
        """Runs the Sequences in the Decoder that exists if it suits, else in a new one."""
        decoder = self.decoder(backend, rows)
        try:
            yield from decoder.run(sequences, report)
        finally:
            self.decoders[backend, rows] = decoder

    @torch.inference_mode(False)  # what is made now is also for callers who are not in that mode
    def decoder(self, name, rows):
        """A Decoder that is not in use: the last one, or a new one."""
        if weights_now(self.model) != self.weights:  # what was made keeps addresses and copies of the weights before
            self.made.clear()
            self.decoders.clear()
        if name not in self.made:
            self.made[name] = make_backend(name, self.model)
            self.weights = weights_now(self.model)
        decoder = self.decoders.pop((name, rows), None)
        self.decoders.clear()  # the cache of another would take memory from the new one's
        return decoder or Decoder(self.made[name], rows, self.tokenizer.eot, self.unused_ids())

    def fitting_rows(self, texts):
        """Row slots for so many texts: as many as are of use on this device, and as their caches may take memory."""
        fitting = int(free_memory(self.model.device) * CACHE_SHARE) // row_bytes(self.model)
        return max(1, min(texts, MOST_ROWS[self.model.device.type], fitting))

    def sequences(self, prompts, prompt_ids, params):
        for number, (prompt, prompt_id, each) in enumerate(zip(prompts, prompt_ids, params, strict=True)):
            ids = prompt.tolist()
            for sample in range(each.num_samples):
                yield Sequence(number, ids, prompt_id, sample, each, self.tokenizer)

    def encode(self, prompt, name, params):
        """The ids of a prompt, int32 (T,); end-of-text for an empty one. InputError for more than the context."""
        ids = self.tokenizer.encode(prompt, params.allow_special) or [self.tokenizer.eot]
        context = self.model.config.block_size
        if len(ids) > context and not params.truncate:
            raise InputError(f"{name} has {len(ids)} tokens, context is {context}; use --truncate")
        return np.array(ids[-context:], dtype=np.int32)

    def unused_ids(self):
        """Ids that stand for no text and must never be chosen."""
        special = set(self.tokenizer.encoding._special_tokens.values())
        return [i for i in np.flatnonzero(self.tokenizer.byte_lengths() == 0).tolist() if i not in special]


def weights_now(model):
    """Returns what tells a model's weights from later ones: their addresses and how often they were changed in place.
    Tensors made in inference mode count no changes."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors]
