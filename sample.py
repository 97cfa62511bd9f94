"""Checkpoint + prompts -> text.

    python sample.py out/shakespeare --prompt "To be, or" --max_new_tokens 100
    echo "Once upon a time" | python sample.py gpt2 --num_samples 3 --seed 1
    python sample.py gpt2 --prompts questions.jsonl --out answers.jsonl --temperature 0

CHECKPOINT is a step folder, a run folder (its best, else its newest), any Hugging Face GPT-2 folder, or a hub name."""

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gpt.config import fields, flatten, from_cli, refuse
from gpt.errors import InputError, ResourceError, printable, run_main, silence
from gpt.generate import GenerationParams, TextGenerator
from gpt.prompts import Prompt, from_flag, read_prompts, read_stdin
from gpt.runtime import set_threads

SEPARATOR = "---"


@dataclass(frozen=True)
class Source:
    prompt: str = ""
    """the text to continue; without it, what is piped into stdin; else the text begins after an end-of-text"""
    prompts: str = ""
    """file of prompts: one a line, or .jsonl with {"prompt": ..., "id": ...}; answers are JSONL in the same order"""


@dataclass(frozen=True)
class Destination:
    out: str = ""
    """file for JSONL {id, prompt, text, tokens, logprobs, finish_reason}; without it, texts or JSONL go to stdout"""
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
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch"""


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]]
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
        if self.generation.logprobs and not self.as_jsonl:
            problems.append("--logprobs is for JSONL: add --out FILE or --prompts FILE")
        if self.as_jsonl and (self.destination.stream == "on" or self.destination.raw):
            problems.append("--stream and --raw are for text on stdout, not for JSONL")
        refuse(problems)


def main():
    config, given = from_cli(SampleConfig, description=__doc__)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    prompts = prompts_of(config, given)
    check_writable(config.destination.out, config.source.prompts)
    set_threads(config.machine.threads)
    generator = TextGenerator.load(config.checkpoint, config.machine.device, config.machine.dtype)
    values = flatten(config.generation)
    params = generator.params(**{name: values[name] for name in given & fields(GenerationParams).keys()})
    if config.generation.seed is None:
        print(f"seed: {params.seed}", file=sys.stderr, flush=True)
    if config.as_jsonl:
        write_jsonl(generator, prompts, params, config.destination.out)
    else:
        show(generator, prompts[0], params, config.destination)


def prompts_of(config, given):
    if {"prompt", "prompts"} <= given:
        raise InputError("settings: --prompt and --prompts exclude each other; give one of them")
    if "prompts" in given:
        return read_prompts(config.source.prompts)
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


def write_jsonl(generator, prompts, params, out):
    """One line for each sample of each prompt, in the order of the prompts, to the file `out` or to stdout. Every line
    is written as soon as it and all before it are finished."""
    from tqdm import tqdm

    escape = not out and sys.stdout.isatty()
    events = generator.run([p.text for p in prompts], params, [p.id for p in prompts])
    finished, written = {}, 0
    with writing(out) as file, tqdm(total=len(prompts) * params.num_samples, disable=not sys.stderr.isatty()) as bar:
        for sequence, _ in events:
            if sequence.finish_reason:
                finished[sequence.number] = sequence.completion
                bar.update()
            while written in finished:
                line = json_line(prompts[written // params.num_samples], finished.pop(written))
                file.write(json.dumps(line, ensure_ascii=escape) + "\n")
                file.flush()
                written += 1


def json_line(prompt, completion):
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "text": completion.text,
        "tokens": completion.ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


@contextlib.contextmanager
def writing(out):
    """The file `out`, made anew, or stdout. Raises ResourceError if writing fails."""
    try:
        if not out:
            yield sys.stdout
            return
        # A lone surrogate from a JSONL prompt becomes \\udXXX, which is its JSON escape.
        with open(out, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        if not out:
            silence(sys.stdout)  # what could not be written would fail again at the end
        raise ResourceError(f"{out or 'stdout'}: {error.strerror}; free space or give another --out") from None


if __name__ == "__main__":
    run_main(main)
