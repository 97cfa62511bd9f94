"""Measures what a precision costs a trained model on a text: perplexity, and the error of the logits against fp32.

    python benchmarks/quality.py out/shakespeare shakespeare.txt
    python benchmarks/quality.py gpt2 text.txt --forms fp32,bf16,int8:native --tokens 8192
    python benchmarks/quality.py gpt2 text.txt --forms int8:native --march x86-64

A form is a precision and a back end. Every form reads the same windows of the text, token by token, through the decode
step that generates."""

import argparse
import math
import sys
from pathlib import Path

from machine import compile_for, default_threads, open_record
from report import print_columns, reporting, tell

REFERENCE = "fp32:eager"


def main() -> None:
    config = parse(sys.argv[1:])
    if config.march:
        compile_for(config.march, Path("out/benchmarks", config.march))
    record = open_record(config, config.device, results=[])
    with reporting(config, record, print_results) as save:
        reference = run_form(config, REFERENCE)
        record["results"].append(summary(REFERENCE, reference, reference))
        for form in config.forms.split(","):
            record["results"].append(summary(form, run_form(config, form), reference))
            save()


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="checkpoint, run folder or hub name")
    add("text", type=Path, help="file of UTF-8 text, of which the end is read")
    add(
        "--forms",
        default="fp32,bf16,int8",
        help="forms, separated by commas: dtype, int8 and back end, as in decode_speed.py (default %(default)s)",
    )
    add(
        "--tokens",
        type=int,
        default=4096,
        help="tokens to read (default %(default)s); all but the first of each window are predicted",
    )
    add("--rows", type=int, default=8, help="windows read side by side (default %(default)s)")
    add("--device", default="auto", help="default %(default)s")
    add("--threads", type=int, default=default_threads(), help="default %(default)s")
    add("--march", help="compile our kernels for another CPU: the compiler's name for it, such as x86-64")
    add("--json", help="file for all figures")
    return parser.parse_args(words)


def run_form(config, form: str) -> tuple:
    """Returns a form's perplexity and its logits (predicted tokens, V)."""
    import torch
    from programs import form_settings

    from gpt.device import set_threads
    from gpt.generate.generator import TextGenerator

    tell(f"reading with {form}")
    set_threads(config.threads)
    generator = TextGenerator.load(config.checkpoint, config.device, **form_settings(form.split(":")))
    with torch.inference_mode():
        return read(generator, windows(generator, config), config.rows)


def windows(generator, config):
    """Returns ids (windows, T) of the end of the text, at most `tokens` ids in all; T is below the context."""
    import torch

    text = config.text.read_text(encoding="utf-8")
    ids = generator.tokenizer.encode(text[-12 * config.tokens :])
    length = min(generator.model.config.block_size - 1, math.ceil(config.tokens / config.rows))
    count = min(config.tokens, len(ids)) // length
    assert count, f"the text has {len(ids)} tokens; one window is {length}"
    return torch.tensor(ids[len(ids) - count * length :]).view(count, length)


def read(generator, ids, rows):
    """Reads ids (windows, T), `rows` windows at a time, each token through a decode step. Returns the perplexity and
    the logits (windows * (T - 1), V). They are in fp32, although 4096 tokens of GPT-2 fill 0.8 GB: fp16 rounds a large
    logit by more than some forms err."""
    import torch

    from gpt.generate.backend import BACKENDS, pick_backend
    from gpt.generate.step import new_cache

    name = pick_backend(generator.backend, generator.model, 1_000_000, rows)
    backend = BACKENDS[name](generator.model)
    predicted = ids.shape[1] - 1
    logits, nats = torch.empty(len(ids), predicted, generator.model.vocab_size), 0.0
    for batch, batch_logits in zip(ids.to(generator.model.device).split(rows), logits.split(rows), strict=True):
        cache = new_cache(generator.model, len(batch))
        for position, (column, target) in enumerate(zip(batch[:, :-1].t(), batch[:, 1:].t(), strict=True)):
            step_logits = backend.decode(column.contiguous(), cache)
            nats -= step_logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
            batch_logits[:, position] = step_logits
    return math.exp(nats / (len(ids) * predicted)), logits.flatten(0, 1)


def summary(form: str, measured: tuple, reference: tuple) -> dict:
    """Compares the perplexity and the logits of a form with those of the reference."""
    (perplexity, logits), (expected, correct) = measured, reference
    squares = sum((a - b).square().sum().item() for a, b in zip(logits, correct, strict=True))
    spread = sum(row.var().item() for row in correct)
    return {
        "form": form,
        "perplexity": perplexity,
        "change": perplexity / expected - 1,
        "rms_error": math.sqrt(squares / correct.numel() / (spread / len(correct))),
        "same_choice": (logits.argmax(-1) == correct.argmax(-1)).float().mean().item(),
    }


def print_results(record: dict) -> None:
    """Prints one line for each form."""
    lines = [["form", "perplexity", "change", "logit error", "same first choice"]]
    for result in record["results"]:
        line = [result["form"], f"{result['perplexity']:.4f}", f"{result['change']:+.3%}"]
        lines.append([*line, f"{result['rms_error']:.3%}", f"{result['same_choice']:.2%}"])
    print_columns(lines)
    print("logit error: root mean square, as a share of the standard deviation of a position's logits")


if __name__ == "__main__":
    main()
