"""Checkpoint + prompts -> text.

    python sample.py out/shakespeare --prompt "To be, or" --max_new_tokens 100
    echo "Once upon a time" | python sample.py gpt2 --num_samples 3 --seed 1
    python sample.py gpt2 --prompts questions.jsonl --out answers.jsonl --temperature 0
    python sample.py gpt2 --interactive

CHECKPOINT is a step folder, a run folder (its best, else its newest), any Hugging Face GPT-2 folder, or a hub name."""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpt.config import fields, flatten, make_config, parse_flags, positional, refuse
from gpt.device import set_threads
from gpt.errors import InputError, ResourceError, note, printable, run_main, stdout_errors, tell
from gpt.generate.answers import Answers, Progress, answer_line, opened
from gpt.generate.generator import GenerationParams, TextGenerator
from gpt.generate.interactive import interact
from gpt.generate.prompts import Prompt, from_flag, read_prompts, read_stdin

SEPARATOR = "---"


@dataclass(frozen=True)
class Source:
    prompt: str = ""
    """the text to continue; without it, what is piped into stdin; else the text begins after an end-of-text"""
    prompts: str = ""
    """file of prompts: one a line, or .jsonl with {"prompt": ..., "id": ..., "temperature": ..., ...}: settings that
    hold for that prompt alone; answers are JSONL in the same order"""
    interactive: bool = False
    """go on with what is typed, line after line; --prompt is taken as the first of them; /help explains"""


@dataclass(frozen=True)
class Destination:
    out: str = ""
    """file for JSONL {id, prompt, text, tokens, logprobs, finish_reason}; without it, texts or JSONL go to stdout. With
    --prompts, answers that are in it stay, whatever their settings were, and only what is missing is generated"""
    stream: Literal["auto", "on", "off"] = "auto"
    """show text while it is generated; auto: on a terminal"""
    raw: bool = False
    """let control characters through to a terminal; to a pipe they always go as they are"""


@dataclass(frozen=True)
class Machine:
    device: str = "auto"
    """auto (CUDA, else Apple's MPS, else CPU), cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """precision of the weights; auto is bf16 where it is native, fp16 on older GPUs, else fp32"""
    quantize: Literal["none", "int8"] = "none"
    """int8: the weights of the large matrices in 8 bits, a scale for each output; C++ rounds what they multiply too"""
    backend: Literal["auto", "eager", "compiled", "native", "captured"] = "auto"
    """what runs the model: auto chooses by device and amount of work; eager: plain torch; compiled: torch.compile;
    native: own C++ kernels on a CPU, which auto builds in the background when it first misses them; captured: a CUDA
    graph. They round differently: the same text again needs the same one"""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = positional("CHECKPOINT")
    """step folder, run folder (its best, else its newest), Hugging Face GPT-2 folder, or hub name such as gpt2"""
    source: Source = field(default_factory=Source)
    generation: GenerationParams = field(default_factory=GenerationParams)
    destination: Destination = field(default_factory=Destination)
    machine: Machine = field(default_factory=Machine)

    @property
    def as_jsonl(self):
        return bool(self.source.prompts or self.destination.out)

    def __post_init__(self):
        problems = self.generation.problems()
        if self.machine.threads < 0:
            problems.append(f"threads {self.machine.threads} must be 0 or more")
        for name in ("logprobs", "top_logprobs"):
            if getattr(self.generation, name) and not self.as_jsonl:
                problems.append(f"--{name} is for JSONL: add --out FILE or --prompts FILE")
        if self.as_jsonl and (self.destination.stream == "on" or self.destination.raw):
            problems.append("--stream and --raw are for text on stdout, not for JSONL")
        if self.source.interactive:
            problems += self.not_interactive()
        refuse(problems)

    def not_interactive(self):
        """What does not go with --interactive, in words."""
        rules = [
            (not self.source.prompts, "--interactive and --prompts exclude each other"),
            (not self.destination.out, "--interactive writes to stdout; leave out --out"),
            (self.generation.num_samples == 1, "--interactive is one text at a time; leave out --num_samples"),
            (self.destination.stream != "off", "--interactive always streams; leave out --stream off"),
        ]
        return [text for fine, text in rules if not fine]


def main():
    flags = parse_flags(SampleConfig, sys.argv[1:], __doc__)
    config, given = make_config(SampleConfig, flags), flags.keys()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    prompts = prompts_of(config, given)
    check_writable(config.destination.out, config.source.prompts)
    answers = answers_so_far(config, prompts)
    prompts = [prompt for prompt in prompts if prompt.id not in answers.finished] if answers else prompts
    if answers and not prompts:
        return
    set_threads(config.machine.threads)
    machine = config.machine
    generator = TextGenerator.load(config.checkpoint, machine.device, machine.dtype, machine.quantize, machine.backend)
    values = flatten(config.generation)
    settings = {name: values[name] for name in given & fields(GenerationParams).keys()}
    params = generator.params(**settings)
    if config.generation.seed is None:
        tell(f"seed: {params.seed}")
    if config.source.interactive:
        converse(generator, settings, params.seed, prompts, config.destination)
    elif config.as_jsonl:
        settings["seed"] = params.seed
        write_jsonl(generator, prompts, params_of(prompts, generator, settings), config.destination.out, answers)
    else:
        show(generator, prompts[0], params, config.destination)


def prompts_of(config, given):
    """The prompts that the flags name or stdin holds; --interactive may have none."""
    if {"prompt", "prompts"} <= given:
        raise InputError("settings: --prompt and --prompts exclude each other; give one of them")
    if "prompts" in given:
        return read_prompts(config.source.prompts)
    if config.source.interactive and "prompt" not in given:
        return []
    return [Prompt(1, from_flag(config.source.prompt) if "prompt" in given else read_stdin())]


def check_writable(out, prompts):
    """Raises InputError, before anything is loaded, if `out` cannot be a file or would replace the file of prompts."""
    path, reason = Path(out), None
    if out and path.is_dir():
        reason = "is a folder"
    elif out and not path.parent.is_dir():
        reason = "its folder does not exist"
    elif out and prompts and path.resolve() == Path(prompts).resolve():
        reason = "is the file of prompts"
    if reason:
        raise InputError(f"{out}: {reason}; give --out another name")


def answers_so_far(config, prompts):
    """The Answers that are in the file for those to `prompts`, and a note of them; None without such a file."""
    out = config.destination.out
    if not (config.source.prompts and out):
        return None
    samples = {prompt.id: prompt.settings.get("num_samples", config.generation.num_samples) for prompt in prompts}
    answers = Answers(out, prompts, samples)
    if answers.finished:
        rest = "going on" if len(answers.finished) < len(prompts) else "delete it to make them again"
        note("info", f"{out}: {len(answers.finished)} of {len(prompts)} prompts are answered; {rest}")
    return answers


def converse(generator, settings, seed, prompts, destination):
    escape = sys.stdout.isatty() and not destination.raw
    with writing("") as file:
        interact(generator, settings, seed, file, prompts[0].text if prompts else None, escape)


def show(generator, prompt, params, destination):
    """Print prompt and text of each sample: as they grow, or each when it is finished. What an interrupt cuts short is
    printed too."""
    terminal = sys.stdout.isatty()
    live = destination.stream == "on" or (destination.stream == "auto" and terminal)
    events = generator.run([prompt.text], params, [prompt.id])
    with writing("") as file:
        page = Page(file, prompt.text, params.num_samples, escape=terminal and not destination.raw)
        try:
            for sequence, piece in events:
                page.add(sequence, piece, live)
        finally:
            page.close()


class Page:
    """Samples of one prompt on `file`, one below the other, SEPARATOR between them; text of a later one waits."""

    def __init__(self, file, prompt, samples, escape):
        self.file, self.prompt, self.escape = file, prompt, escape
        self.waiting, self.finished = [""] * samples, set()  # text not yet shown, by sample; samples
        self.current = 0  # the sample being shown
        self.put(prompt)

    def put(self, text):
        self.file.write(printable(text) if self.escape else text)
        self.file.flush()

    def put_waiting(self):
        text, self.waiting[self.current] = self.waiting[self.current], ""
        self.put(text)

    def add(self, sequence, piece, live):
        """Take the next piece of a sample. In its turn it is shown when it is finished, or at once if `live`."""
        self.waiting[sequence.sample] += piece
        if sequence.finish_reason:
            self.finished.add(sequence.sample)
        if live and sequence.sample == self.current:
            self.put_waiting()
        while self.current in self.finished:
            self.put_waiting()
            self.current += 1
            self.put("\n" + (f"{SEPARATOR}\n{self.prompt}" if self.current < len(self.waiting) else ""))

    def close(self):
        """Show what there is of an unfinished sample."""
        if self.current < len(self.waiting):
            self.put_waiting()
            self.put("\n")


def params_of(prompts, generator, settings):
    """The GenerationParams of each prompt: its own settings over `settings`. Those with the same share one."""
    keys = [tuple(sorted(prompt.settings.items())) for prompt in prompts]
    made = {key: generator.params(**settings | dict(key)) for key in set(keys)}
    return [made[key] for key in keys]


def write_jsonl(generator, prompts, params, out, answers=None):
    """One line for each sample of each prompt, in the order of the prompts, to the file `out` or to stdout; `params`
    has a GenerationParams for each. Every line is written as soon as it and all before it are finished."""
    escape = not out and sys.stdout.isatty()
    events = generator.run([p.text for p in prompts], params, [p.id for p in prompts])
    places = ((number, sample) for number, own in enumerate(params) for sample in range(own.num_samples))
    place, finished = next(places), {}
    with writing(out, answers) as file, Progress(answers.texts if answers else 0, params) as progress:
        for sequence, _ in events:
            progress.add(bool(sequence.finish_reason))
            if sequence.finish_reason:
                line = answer_line(prompts[sequence.number], sequence.completion, escape)
                finished[sequence.number, sequence.sample] = line
            while place in finished:
                file.write(finished.pop(place) + "\n")
                file.flush()
                place = next(places, None)


@contextlib.contextmanager
def writing(out, answers=None):
    """Yields stdout if `out` is empty, else the file `out`: a new one, or after `answers` the old one. Raises
    ResourceError if writing fails."""
    if not out:
        with stdout_errors():
            yield sys.stdout
        return
    try:
        with opened(out, answers) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResourceError(f"{out}: {error.strerror}; free space or give another --out") from None


if __name__ == "__main__":
    run_main(main)
