"""What the tests of data preparation share: running it, and reading its shards back with numpy alone."""

import hashlib
import itertools
import json
import subprocess
import sys

import numpy as np
from paths import ROOT
from prepare import PrepareConfig, prepare

ALPHABET = [
    *"abcXYZ019 \t\n\r'.,!?-/<|>_^é½ſ",
    " ",
    " ",
    "\n",
    "  ",
    "\n\n",
    "\r\n",
    "'s",
    "你好。",
    "日本",
    "\u0301",
    "\u3000",
]
ALPHABET += [
    "😀",
    "\u00a0",
    "\x85",
    "\x1c",
    "\x1f",
    "\u200b",
    " \n",
    "\n ",
    ".\n",
    "/\n/",
    "\t\n",
    "'LL",
    "DŽ",
    "٣",
    "\u2028",
]
EOT = 256  # of the byte tokenizer, which most tests use


def prepare_here(out, *inputs, tokenizer="byte", workers=1, **settings):
    """Prepare `inputs` into `out` in this process; returns the manifest."""
    config = PrepareConfig(str(out), tuple(map(str, inputs)), tokenizer=tokenizer, workers=workers, **settings)
    prepare(config, typed=settings)
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def script(*arguments, **options):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)


def ids_of(folder, split="train"):
    """All ids of a split, read with numpy alone."""
    files = sorted(folder.glob(f"{split}_*.bin"))
    return np.concatenate([read_shard(file) for file in files]) if files else np.array([], np.int64)


def read_shard(file):
    header = np.frombuffer(file.read_bytes()[:1024], "<i4")
    ids = np.frombuffer(file.read_bytes()[1024:], {20240520: "<u2", 20240801: "<u4"}[int(header[0])])
    assert len(ids) == header[2]
    return ids.astype(np.int64)


def documents_of(folder, split="train"):
    """The texts between the end-of-text ids of a split made with the byte tokenizer."""
    ids = ids_of(folder, split)
    starts = [*np.flatnonzero(ids == EOT), len(ids)]
    return [bytes(ids[a + 1 : b].tolist()).decode() for a, b in itertools.pairwise(starts)]


def checksums(folder, but=""):
    paths = [path for path in sorted(folder.iterdir()) if path.name != but]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def write(path, text, **options):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(**options))
    return path


def jsonl(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def rows(*texts):
    return jsonl(*({"text": text} for text in texts))
