"""Checkpoint + prompts -> text.

    python sample.py out/shakespeare --prompt "To be, or" --max_new_tokens 100
    echo "Once upon a time" | python sample.py gpt2 --num_samples 3 --seed 1
    python sample.py gpt2 --prompts asked.jsonl --out answers.jsonl --seed 1
    python sample.py gpt2 --interactive
    python sample.py out/tuned --chat

CHECKPOINT is a step folder, a run folder (its best, else its newest), any Hugging Face GPT-2 folder or hub name, a LoRA
adapter of PEFT, or nanoGPT's ckpt.pt."""

import gpt.kernels.waiting  # noqa: F401 (before torch)

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt.config import fields, make_config, parse_flags, positional, refuse, unescaped
from gpt.device import set_threads
from gpt.errors import InputError, note, printable, run_main, stdout_errors, tell
from gpt.generate.answers import AnswerBar, Answers, answer_line, open_answers, read_answers
from gpt.generate.chat import Chat
from gpt.generate.generator import TextGenerator
from gpt.generate.interactive import Session, interact
from gpt.generate.prompts import Prompt, from_flag, read_prompts, read_stdin
from gpt.generate.sequence import GenerationParams, in_order

SEPARATOR = "---"


@dataclass(frozen=True)
class SourceConfig:
    prompt: str = ""
    """the text to continue; without it, what is piped into stdin; else the text begins after an end-of-text"""
    escape: bool = False
    """read \n, \t and \\ in --prompt as a line break, a tab and a backslash"""
    prompts: str = ""
    """file of prompts: one a line, or .jsonl with {"prompt": ..., "id": ..., "temperature": ..., ...}: settings that
    hold for that prompt alone, or .csv with such columns; "messages" in place of "prompt" is a conversation to answer;
    answers are JSONL in the same order"""
    interactive: bool = False
    """continue what is typed, line after line; --prompt counts as typed first; /help explains"""
    chat: bool = False
    """a conversation with a model that has learned from messages: --prompt and what is typed are messages, and each
    answer ends at its end-of-text; /help explains"""


@dataclass(frozen=True)
class OutputConfig:
    out: str = ""
    """file for JSONL {id, prompt, text, tokens, logprobs, finish_reason}; without it, texts or JSONL go to stdout. With
    --prompts, answers that it holds already stay, whatever their settings were, and only the others are generated"""
    stream: Literal["auto", "on", "off"] = "auto"
    """show text while it is generated; auto: on a terminal"""
    raw: bool = False
    """let control characters through to a terminal; to a pipe they always go as they are"""


@dataclass(frozen=True)
class EngineConfig:
    device: str = "auto"
    """auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of the weights; auto is bf16 or, on older GPUs, fp16, and on a CPU what a short measurement finds
    faster (name one to get the same text again)"""
    quantize: Literal["none", "int8"] = "none"
    """int8: the weights of the large matrices in 8 bits, a scale for each output; C++ rounds what they multiply too"""
    backend: Literal["auto", "eager", "compiled", "native", "captured"] = "auto"
    """what runs the model: auto chooses by device, amount of work and, on a CPU, a short measurement; eager: plain
    torch; compiled: torch.compile; native: own C++ kernels on a CPU, which auto builds in the background when they are
    missing; captured: a CUDA graph. They round differently: the same text again needs the same one"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = positional("CHECKPOINT")
    """step folder, run folder (its best, else its newest), Hugging Face GPT-2 folder, hub name such as gpt2, PEFT's
    adapter, or nanoGPT's ckpt.pt"""
    source: SourceConfig = field(default_factory=SourceConfig)
    generation: GenerationParams = field(default_factory=GenerationParams)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def as_jsonl(self) -> bool:
        return bool(self.source.prompts or self.output.out)

    def __post_init__(self) -> None:
        generation, output, jsonl, chat = self.generation, self.output, self.as_jsonl, self.source.chat
        typed, name = self.source.interactive or chat, "--chat" if chat else "--interactive"
        rules = [
            (self.engine.threads >= 0, f"threads {self.engine.threads} must be 0 or more"),
            (jsonl or not generation.logprobs, "--logprobs is for JSONL: add --out FILE or --prompts FILE"),
            (jsonl or not generation.top_logprobs, "--top_logprobs is for JSONL: add --out FILE or --prompts FILE"),
            (not jsonl or output.stream != "on", "--stream on is for text on stdout, not for JSONL"),
            (not jsonl or not output.raw, "--raw is for text on stdout, not for JSONL"),
            (not typed or not self.source.prompts, f"{name} and --prompts exclude each other"),
            (not typed or not output.out, f"{name} writes to stdout; leave out --out"),
            (not typed or generation.num_samples == 1, f"{name} is one text at a time; leave out --num_samples"),
            (not typed or output.stream != "off", f"{name} always streams; leave out --stream off"),
            (not chat or not self.source.interactive, "--chat is interactive by itself; leave out --interactive"),
            (not chat or not generation.ignore_eot, "--chat ends turns at end-of-text; leave out --ignore_eot"),
            (
                not chat or not generation.allow_special,
                "--chat reads special tokens as text; leave out --allow_special",
            ),
        ]
        refuse(generation.problems() + [text for is_fine, text in rules if not is_fine])


def main() -> None:
    flags = parse_flags(SampleConfig, sys.argv[1:], __doc__)
    if "stop" in flags:
        flags["stop"] = tuple(unescaped(from_flag(stop, "--stop")) for stop in flags["stop"])
    config = make_config(SampleConfig, flags)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    prompts = prompts_of(config, flags)
    check_writable(config.output.out, config.source.prompts)
    answers = answers_so_far(config, prompts)
    if answers and answers.texts == answers.total:
        return
    engine, expected = config.engine, [config.generation] * len(prompts)  # settings of single prompts matter little
    set_threads(engine.threads)
    options = engine.device, engine.dtype, engine.quantize, engine.backend
    generator = TextGenerator.load(config.checkpoint, *options, expected)
    settings = {name: value for name, value in flags.items() if name in fields(GenerationParams)}
    params = generator.params(**settings)
    assert params.seed is not None
    if config.generation.seed is None:
        tell(f"seed: {params.seed}")
    if config.source.interactive or config.source.chat:
        with stdout_errors():
            first = prompts[0].text if prompts else None
            kind = Chat if config.source.chat else Session
            interact(generator, settings, params.seed, stdout_writer(config.output.raw), first, kind)
    elif config.as_jsonl:
        write_jsonl(generator, prompts, settings | {"seed": params.seed}, config.output.out, answers)
    else:
        show(generator, prompts[0], params, config.output)


def prompts_of(config: SampleConfig, flags: dict[str, Any]) -> list[Prompt]:
    """Returns the prompts of --prompt, --prompts or stdin; [] for --interactive or --chat without --prompt. Raises
    InputError if --prompt and --prompts are both given, or if the prompts cannot be read."""
    if {"prompt", "prompts"} <= flags.keys():
        raise InputError("settings: --prompt and --prompts exclude each other; give one of them")
    if config.source.escape and "prompt" not in flags:
        raise InputError("settings: --escape is for --prompt; give both, or leave out --escape")
    if "prompts" in flags:
        return read_prompts(config.source.prompts)
    if (config.source.interactive or config.source.chat) and "prompt" not in flags:
        return []
    return [Prompt(1, text_of(config.source) if "prompt" in flags else read_stdin())]


def text_of(source: SourceConfig) -> str:
    """Returns the text of --prompt. Without --escape, prints a note on a terminal if that seems to be missing."""
    text = from_flag(source.prompt)
    if source.escape:
        return unescaped(text)
    if re.search(r"\\[nt]", text) and sys.stderr.isatty():
        note("info", r"--prompt has \n or \t as two characters; --escape reads them as a line break and a tab")
    return text


def check_writable(out: str, prompts: str) -> None:
    """Raises InputError, before anything is loaded, if `out` ("": stdout) cannot be a file or is the file of
    prompts."""
    rules = [
        (os.path.isdir(out), "is a folder"),
        (not os.path.isdir(Path(out).parent), "its folder does not exist"),
        (prompts and os.path.realpath(out) == os.path.realpath(prompts), "is the file of prompts"),
    ]
    reasons = [reason for applies, reason in rules if applies]
    if out and reasons:
        raise InputError(f"{out}: {reasons[0]}; give --out another name")


def answers_so_far(config: SampleConfig, prompts: list[Prompt]) -> Answers | None:
    """Returns the Answers to --prompts that the file --out holds already, and prints how many they are. Returns None if
    --prompts or --out is not given, or if --out exists and is no regular file."""
    out = config.output.out
    if not (config.source.prompts and out) or (os.path.exists(out) and not os.path.isfile(out)):
        return None
    samples = [prompt.settings.get("num_samples", config.generation.num_samples) for prompt in prompts]
    answers = read_answers(out, prompts, samples)
    if answers.texts:
        rest = "the others follow" if answers.texts < answers.total else "delete it to generate them again"
        note("info", f"{out}: holds {answers.texts} of {answers.total} texts; {rest}")
    return answers


def stdout_writer(raw: bool) -> Callable[[str], None]:
    """Returns a function that writes text to stdout and flushes it. On a terminal the function escapes control
    characters, unless `raw`."""
    escape = sys.stdout.isatty() and not raw

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if escape else text)
        sys.stdout.flush()

    return write


def show(generator: TextGenerator, prompt: Prompt, params: GenerationParams, output: OutputConfig) -> None:
    """Prints the prompt and the text of each sample: piece by piece if `output.stream` asks for it, else when the text
    is finished. After an interrupt, also prints the unfinished text so far."""
    live = output.stream == "on" or (output.stream == "auto" and sys.stdout.isatty())
    write, waiting, unfinished = stdout_writer(output.raw), "", params.num_samples
    events = generator.events([prompt.text], [params], [prompt.id])
    with stdout_errors():
        write(prompt.text)
        try:
            for sequence, piece in in_order(events):
                waiting += piece
                if live or sequence.finish_reason:
                    write(waiting)
                    waiting = ""
                if sequence.finish_reason:
                    unfinished -= 1
                    write(f"\n{SEPARATOR}\n{prompt.text}" if unfinished else "\n")
        finally:
            if unfinished:
                write(waiting + "\n")


def write_jsonl(
    generator: TextGenerator, prompts: list[Prompt], settings: dict[str, Any], out: str, answers: Answers | None
) -> None:
    """Writes a JSON line for each text to the file `out` ("": stdout), in the order of the prompts: as soon as this
    text and all texts before it are finished. Leaves out the texts that `answers` holds already. The settings of a
    prompt override `settings`."""
    params_of = functools.cache(lambda own: generator.params(**settings | dict(own)))
    params = [params_of(tuple(prompt.settings.items())) for prompt in prompts]
    skip, total = answers.texts if answers else 0, sum(own.num_samples for own in params)
    asked = [prompt.turns or prompt.text for prompt in prompts]
    events = generator.events(asked, params, [prompt.id for prompt in prompts], skip)
    escape = not out and sys.stdout.isatty()
    with open_answers(out, answers) as file, AnswerBar(skip, total, shown=not escape) as bar:
        for sequence, _ in in_order(bar.count(events)):
            if sequence.finish_reason:
                line = answer_line(prompts[sequence.prompt_number], sequence.completion, escape)
                file.write(line + "\n")
                file.flush()


if __name__ == "__main__":
    run_main(main)
