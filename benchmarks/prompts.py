"""Many prompts of unequal length: rows that are refilled as texts end, against fixed batches in the order of the file.

    python benchmarks/prompts.py --work /tmp/bench --json prompts.json
    python benchmarks/prompts.py --work /tmp/bench --prompts 100 --dtype bf16

All ways use the same model, back end and number of rows and must give the same texts. A fixed batch runs until its
longest text is done; its rows that have finished wait. Its prompts are read padded to the longest, as a batch in one
tensor is; --unpadded adds fixed batches that read them as the refilled rows do."""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import weights
from decode import default_threads, tell

PROMPT_TOKENS, NEW_TOKENS = (5, 400), (10, 200)  # from, to


def main():
    config = parse(sys.argv[1:])
    generator = load(config)
    prompts, params = task(generator, weights.make_weights(config.work, config.model), config)
    tokens = sum(each.max_new_tokens for each in params)
    ways = {"refilled": refilled, "fixed": fixed} | ({"unpadded": unpadded} if config.unpadded else {})
    rounds = []
    warm = slice(0, config.rows)
    refilled(generator, prompts[warm], params[warm], config.rows)
    for number in range(config.rounds):
        found, seconds = {}, {}
        for name, way in ways.items():
            tell(f"round {number + 1} of {config.rounds}: {name}")
            start = time.perf_counter()
            found[name] = way(generator, prompts, params, config.rows)
            seconds[name] = time.perf_counter() - start
        for name in ways:
            assert found[name] == found["refilled"], f"{name}: other texts than refilled"
        rounds.append(seconds)
    report(config, tokens, rounds)


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="gpt2", choices=weights.SIZES, help="default %(default)s")
    add("--prompts", type=int, default=1000, help="how many (default %(default)s)")
    add("--rows", type=int, default=8, help="texts side by side (default %(default)s)")
    add("--rounds", type=int, default=1, help="default %(default)s")
    add("--unpadded", action="store_true", help="a third way: fixed batches without padding")
    add("--dtype", default="auto", help="default %(default)s")
    add("--quantize", default="none", help="none or int8 (default %(default)s)")
    add("--backend", default="auto", help="default %(default)s")
    add("--device", default="auto", help="default %(default)s")
    add("--threads", type=int, default=default_threads(), help="default %(default)s")
    add("--work", type=Path, default=Path("out/benchmarks"), help="folder for weights (default %(default)s)")
    add("--json", help="file for all figures")
    return parser.parse_args(words)


def load(config):
    from gpt.generate import TextGenerator
    from gpt.runtime import set_threads

    set_threads(config.threads)
    folder = weights.make_weights(config.work, config.model)
    return TextGenerator.load(folder, config.device, config.dtype, config.quantize, config.backend)


def task(generator, folder, config):
    """Texts and the GenerationParams of each; lengths are drawn from a fixed seed."""
    import numpy as np

    draw = np.random.default_rng(1)
    lengths = draw.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, config.prompts)
    limits = draw.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1, config.prompts)
    words = weights.prompts_of(folder, config.prompts, PROMPT_TOKENS[1])
    texts = [generator.tokenizer.decode(row[:length]) for row, length in zip(words, lengths, strict=True)]
    settings = {"ignore_eot": True, "seed": 1, "rows": config.rows, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    return texts, [generator.params(max_new_tokens=int(limit), **settings) for limit in limits]


def refilled(generator, prompts, params, rows, first_id=1):
    """The ids of each prompt's text, by the number of the prompt."""
    texts = {}
    for sequence, _ in generator.run(prompts, params, range(first_id, first_id + len(prompts))):
        if sequence.finish_reason:
            texts[first_id + sequence.number] = sequence.completion.ids
    return texts


def fixed(generator, prompts, params, rows):
    """The same, batch by batch, the prompts of each padded to its longest."""
    texts = {}
    for start in range(0, len(prompts), rows):
        batch = slice(start, start + rows)
        longest = max(len(generator.tokenizer.encode(prompt)) for prompt in prompts[batch])
        with padded_to(longest - 1):  # a prompt's last token is read by the first step
            texts |= refilled(generator, prompts[batch], params[batch], rows, first_id=start + 1)
    return texts


def unpadded(generator, prompts, params, rows):
    texts = {}
    for start in range(0, len(prompts), rows):
        batch = slice(start, start + rows)
        texts |= refilled(generator, prompts[batch], params[batch], rows, first_id=start + 1)
    return texts


@contextlib.contextmanager
def padded_to(tokens):
    """Meanwhile a Decoder reads every prompt with padding behind it, and forgets the padding."""
    import torch

    from gpt.decode import Decoder

    plain = Decoder.prefill

    def prefill(decoder, slot, ids):
        plain(decoder, slot, torch.nn.functional.pad(ids, (0, tokens - len(ids))))
        decoder.cache.keep(slot, len(ids))

    Decoder.prefill = prefill
    try:
        yield
    finally:
        Decoder.prefill = plain


def report(config, tokens, rounds):
    ratios = {name: [each[name] / each["refilled"] for each in rounds] for name in rounds[0] if name != "refilled"}
    speeds = {name: tokens / statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    print(f"{config.prompts} prompts, {tokens} new tokens, {config.rows} rows, {config.model}")
    for name, speed in speeds.items():
        print(f"  {name:8} {speed:8.1f} tok/s")
    for name, found in ratios.items():
        print(f"  refilled / {name}: {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})")
    if config.json:
        record = {"settings": vars(config) | {"work": str(config.work)}, "tokens": tokens, "rounds": rounds}
        Path(config.json).write_text(json.dumps(record | {"ratios": ratios}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
