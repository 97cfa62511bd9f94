"""Measures many prompts of unequal length: rows refilled as texts end, against fixed batches in the order of the file.

    python benchmarks/many_prompts.py --json prompts.json
    python benchmarks/many_prompts.py --prompts 100 --dtype bf16

All ways use the same model, back end and number of rows. A fixed batch runs until its longest text is done, while rows
that have finished wait. "fixed" pads every prompt to the longest one of its batch: a batch in one tensor must do that,
and most programs run batches so. "unpadded" saves that work, as the refilled rows do. It is the harder comparison: all
that refilling gains over it comes from rows that do not wait.

On the native back end all ways must give the same texts. On others padding changes the shape of products and so their
rounding; the share of equal texts is reported. The file --json is written whenever a way is done."""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import weights
from machine import default_threads, open_record
from report import reporting, show_so_far, tell
from workers import in_turn

PROMPT_TOKENS, NEW_TOKENS = (5, 400), (10, 200)  # least, most


def main() -> None:
    config = parse(sys.argv[1:])
    import short_spins  # noqa: F401 (before torch)

    record = open_record(config, config.device, rounds=[], equal=[], ratios={})
    folder = weights.make_weights(config.work, config.model)
    generator = load(config, folder)
    prompts, lengths, params = task(generator, folder, config)
    ways = {
        "refilled": lambda: refilled(generator, prompts, params),
        "fixed": lambda: fixed(generator, prompts, lengths, params, padded=True),
        "unpadded": lambda: fixed(generator, prompts, lengths, params, padded=False),
    }
    refilled(generator, prompts[: config.rows], params[: config.rows])  # warm up
    record |= {"backend": generator.backend, "tokens": sum(each.max_new_tokens for each in params)}
    with reporting(config, record, report) as save:
        for number in range(config.rounds):
            one_round(ways, number, params, record, save)
            show_so_far(report, record)


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="gpt2", choices=weights.SIZES, help="default %(default)s")
    add("--prompts", type=int, default=1000, help="number of prompts (default %(default)s)")
    add("--rows", type=int, default=8, help="texts side by side (default %(default)s)")
    add("--rounds", type=int, default=1, help="number of rounds; each begins with another way (default %(default)s)")
    add("--dtype", default="auto", help="default %(default)s")
    add("--quantize", default="none", help="none or int8 (default %(default)s)")
    add("--backend", default="auto", help="default %(default)s")
    add("--device", default="auto", help="default %(default)s")
    add("--threads", type=int, default=default_threads(), help="default %(default)s")
    add("--work", type=Path, default=Path("out/benchmarks"), help="folder for weights (default %(default)s)")
    add("--json", help="file for all figures")
    return parser.parse_args(words)


def load(config, folder: Path):
    """Returns a TextGenerator whose back end does not depend on the number of prompts in a call."""
    from gpt.device import set_threads
    from gpt.generate.backend import pick_backend
    from gpt.generate.generator import TextGenerator

    set_threads(config.threads)
    generator = TextGenerator.load(folder, config.device, config.dtype, config.quantize, config.backend)
    steps = config.prompts * sum(NEW_TOKENS) // 2 // config.rows
    generator.backend = pick_backend(config.backend, generator.model, steps, config.rows)
    return generator


def task(generator, folder: Path, config) -> tuple[list[str], list[int], list]:
    """Returns the prompts, their lengths in tokens, and the GenerationParams of each, drawn from a fixed seed."""
    import numpy as np

    draw = np.random.default_rng(1)
    lengths = draw.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, config.prompts)
    limits = draw.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1, config.prompts)
    words = weights.prompts_of(folder, config.prompts, PROMPT_TOKENS[1])
    texts = [generator.tokenizer.decode(row[:length]) for row, length in zip(words, lengths, strict=True)]
    encoded = [len(generator.tokenizer.encode(text)) for text in texts]
    settings = {"ignore_eot": True, "seed": 1, "rows": config.rows, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    return texts, encoded, [generator.params(max_new_tokens=int(limit), **settings) for limit in limits]


def one_round(ways: dict, number: int, params: list, record: dict, save: Callable) -> None:
    """Runs each way once. Adds to the record the seconds by way; and for each way but refilling, the ratio and the
    share of texts that equal those of the refilled rows. All texts must have the length asked for; on the native back
    end all must be equal."""
    seconds, texts_of = {}, {}
    record["rounds"].append(seconds)
    for name in in_turn(list(ways), number):
        tell(f"round {number + 1}: {name}")
        start = time.perf_counter()
        texts_of[name] = ways[name]()
        seconds[name] = time.perf_counter() - start
        lengths = [len(texts_of[name][prompt_id]) for prompt_id in range(1, len(params) + 1)]
        assert lengths == [each.max_new_tokens for each in params], f"{name}: texts of other lengths than asked for"
        save()
    expected, equal = texts_of.pop("refilled"), {}
    for name, texts in texts_of.items():
        equal[name] = sum(texts[prompt_id] == expected[prompt_id] for prompt_id in expected) / len(expected)
        exact = record["backend"] == "native"
        assert equal[name] == 1 or not exact, f"{name}: {equal[name]:.1%} of the texts are those of refilled rows"
        record["ratios"].setdefault(name, []).append(seconds[name] / seconds["refilled"])
    record["equal"].append(equal)
    save()


def refilled(generator, prompts: list[str], params: list, first_id: int = 1) -> dict[int, list[int]]:
    """Generates with rows that are refilled. Returns the ids of each text by the number of its prompt."""
    texts = {}
    for sequence, _ in generator.events(prompts, params, range(first_id, first_id + len(prompts))):
        if sequence.finish_reason:
            texts[first_id + sequence.prompt_number] = sequence.completion.ids
    return texts


def fixed(generator, prompts: list[str], lengths: list[int], params: list, padded: bool) -> dict[int, list[int]]:
    """Generates batch by batch. If `padded`, prompts are padded to the longest one of their batch. Returns the ids of
    each text by the number of its prompt."""
    texts, rows = {}, params[0].rows
    for start in range(0, len(prompts), rows):
        batch = slice(start, start + rows)
        longest = max(lengths[batch]) - 1  # the first step reads the last token of a prompt
        with padded_to(longest) if padded else contextlib.nullcontext():
            texts |= refilled(generator, prompts[batch], params[batch], first_id=start + 1)
    return texts


@contextlib.contextmanager
def padded_to(tokens: int):
    """A context in which a Step pads every prompt to `tokens`, and drops the padding from the cache afterwards."""
    from gpt.generate.step import Step

    plain = Step.prefill

    def prefill(step, texts):
        plain(step, {row: ids + [0] * (tokens - len(ids)) for row, ids in texts.items()})

    Step.prefill = prefill
    try:
        yield
    finally:
        Step.prefill = plain


def report(record: dict) -> None:
    """Prints the speeds of all ways, and the ratios of the whole rounds."""
    rounds, settings = record["rounds"], record["settings"]
    shape = f"{settings['prompts']} prompts, {record['tokens']} new tokens, {settings['rows']} rows"
    print(f"{shape}, {settings['model']}, {record['backend']}")
    for name in dict.fromkeys(name for each in rounds for name in each):
        speed = record["tokens"] / statistics.median(each[name] for each in rounds if name in each)
        print(f"  {name:8} {speed:8.1f} tok/s")
    for name, ratios in record["ratios"].items():
        same = min(each[name] for each in record["equal"])
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"  refilled / {name}: {ratio}; {same:.1%} of the texts equal")


if __name__ == "__main__":
    main()
