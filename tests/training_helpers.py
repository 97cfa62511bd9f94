"""For tests that train: small data folders and models, and train.py, run in this process or in another one."""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from paths import ROOT

import train
from gpt.checkpoint.read import OPTIMIZER, STATE, sealed
from gpt.checkpoint.write import save_checkpoint
from gpt.errors import run_main
from gpt.generate.sampling import SamplingParams
from gpt.model import GPT, ModelConfig
from gpt.report.plot import RunPicture
from gpt.text.shards import FIRST, TARGET, ShardWriter, write_manifest
from gpt.text.tokenizer import load_tokenizer, save_tokenizer
from gpt.train.optim import OptimConfig, make_optimizer
from gpt.train.state import optimizer_tensors

# Fixes the settings that change bits. One thread: two threads on a busy machine take ten times as long.
QUICK = ("--dtype", "fp32", "--threads", "1", "--compile", "off", "--device", "cpu")
# A run of eight steps with checkpoints at 4 and 8.
EIGHT_STEPS = ("--max_steps", "8", "--eval_every", "4", "--save_every", "4", "--log_every", "1", "--keep_last", "9")
DRAW, RunPicture.__call__ = RunPicture.__call__, lambda self: None  # drawing takes a second, for each small run
REPORT, train.report = train.report, lambda start, held_out: None  # so does the report, which generates text


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def last(self):
        """The last line on stderr."""
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""


def text_of(size, seed=0):
    """Returns `size` characters of random words. The same seed gives the same text; some words are not ASCII."""
    words = ["the", "sea", "was", "calm", "and", "a", "gull", "cried", "once", "naïve", "雨", "then", "silence.\n"]
    choose = random.Random(seed)
    text = ""
    while len(text) < size:
        text += choose.choice(words) + " "
    return text[:size]


def make_data(folder, train_size=4000, val_size=600, tokenizer="byte", shard_tokens=100_000, seed=0):
    """Writes a data folder of about `train_size` and `val_size` characters (0: no validation) and returns its path.
    `tokenizer` is a name or a Tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    splits = {}
    for split, size in (("train", train_size), ("val", val_size)):
        writer = ShardWriter(folder, split, dtype, shard_tokens)
        if size:
            text = text_of(size, seed if split == "train" else seed + 1)
            ids = [tokenizer.eot, *tokenizer.encode(text)]
            writer.write(ids, documents=1, source_bytes=len(text.encode("utf-8")))
        splits[split] = writer.close()
    save_tokenizer(tokenizer, folder)
    write_manifest(folder, tokenizer.manifest_entry, dtype, splits, {"inputs": ["made by a test"]})
    return folder


def make_examples(folder, train, val=(), shard_tokens=100_000):
    """Writes a data folder of examples with the byte tokenizer and returns its path. An example is (ids, number of its
    last ids that are targets)."""
    folder, tokenizer, splits = Path(folder), load_tokenizer("byte"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in (("train", train), ("val", val)):
        writer = ShardWriter(folder, split, "uint16", shard_tokens, masks=True)
        for ids, learned in examples:
            mask = np.zeros(len(ids), dtype=np.uint8)
            mask[0] = FIRST
            mask[len(ids) - learned :] |= TARGET
            writer.write(np.array(ids), documents=1, source_bytes=len(ids), mask=mask)
        splits[split] = writer.close()
    save_tokenizer(tokenizer, folder)
    write_manifest(folder, tokenizer.manifest_entry, "uint16", splits, {"inputs": ["made by a test"]})
    return folder


def random_examples(count, longest=60, seed=0):
    """Returns `count` examples of 2 to `longest` random ids, of which at least the last is a target."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(2, longest + 1, count)
    return [(numbers.integers(0, 256, length).tolist(), int(numbers.integers(1, length))) for length in lengths]


def tiny_model(vocab_size=257, n_layer=2, n_head=2, n_embd=16, block_size=32, seed=0):
    """Returns a GPT of a few thousand random weights; biases and layer norms are random too."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(n_layer, n_head, n_embd, block_size), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.token.weight[vocab_size:] = 0
    return model


def optimizer_of(model, seed=0):
    """Returns AdamW for `model` after one step on random gradients, so that its state exists."""
    torch.manual_seed(seed)
    optimizer = make_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step(torch.zeros(()))
    optimizer.zero_grad()
    return optimizer


class Recording:
    """Stands in for an optimizer: keeps the gradients of each step."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self, _found_inf):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self):
        for parameter in self.model.parameters():
            parameter.grad = None


def save_step(out, step, model=None, tokenizer=None):
    """Saves a step folder without a run and returns its path."""
    tokenizer = tokenizer or load_tokenizer("byte")
    model = model or tiny_model(tokenizer.vocab_size, seed=step)
    state = {"progress": {"step": step}, "scaler": {}, "config": {"seed": 1}, "runtime": {}, "base": None}
    files = {OPTIMIZER: optimizer_tensors(model, optimizer_of(model)), STATE: state}
    about = {"dataset": {"train": []}, "code": "test"}
    return save_checkpoint(Path(out), step, model, tokenizer, files, asdict(SamplingParams()), about)


def rewrite_manifest(folder, **changes):
    """Changes a manifest and seals it again, as an attacker would."""
    path = folder / "training/manifest.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


def train_here(*args):
    """Runs `python train.py ARGS QUICK` inside this process and returns its Outcome: fast, for tests that kill no
    process."""
    return in_process(train.main, "train.py", *args, *missing(args))


def continue_run(run, *flags):
    """Continues a run, or a copy of it, with the data folder of its settings; returns the Run."""
    data = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["data"]
    return train_here("tiny", "--data", data, "--out", run, *flags)


def in_process(main, name, *args):
    """Runs a script's `main` as `python NAME ARGS` would, and returns its Outcome. Restores torch's settings."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = [name, *map(str, args)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run_main(main)
    except SystemExit as stop:
        return Outcome(stop.code, stdout.getvalue(), stderr.getvalue())
    finally:
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def missing(args):
    """Returns the flags of QUICK that `args` does not give."""
    pairs = zip(QUICK[::2], QUICK[1::2], strict=True)
    return [word for flag, value in pairs if flag not in args for word in (flag, value)]


def start_train(*args, env=None, python=()):
    """Starts `python train.py ARGS QUICK` in another process. Returns a Popen with both outputs as text."""
    command = [sys.executable, *python, str(ROOT / "train.py"), *map(str, args), *missing(args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=os.environ | (env or {}))


def run_train(*args, env=None, python=(), timeout=120):
    """Runs `python train.py ARGS QUICK` in another process and returns its Outcome."""
    process = start_train(*args, env=env, python=python)
    stdout, stderr = process.communicate(timeout=timeout)
    return Outcome(process.returncode, stdout, stderr)


def metrics(out):
    """Returns the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def fingerprint(out, step):
    """Returns the parts that are equal in two runs that are the same to the bit: the hashes of weights and optimizer
    state, and the log (step, loss, grad_norm, lr, val_loss)."""
    folder = Path(out) / f"step-{step:09d}"
    names = ("step", "loss", "grad_norm", "lr", "val_loss")
    logged = [[record.get(name) for name in names] for record in metrics(out)]
    return {
        "weights": sha256(folder / "model.safetensors"),
        "optimizer": sha256(folder / "training/optimizer.safetensors"),
        "log": logged,
    }


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def snapshot(folder):
    """Returns relative path -> (bytes, mtime) of every file below `folder`. Does not follow links."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            files[name] = (os.readlink(path), path.lstat().st_mtime_ns)
        elif path.is_file():
            files[name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return files


def step_names(out):
    """Returns the names of the step folders of a run, in order."""
    return sorted(path.name for path in Path(out).iterdir() if path.name.startswith("step-"))


# ---- other processes, started quickly: forked from one that has imported torch already


class Processes:
    """Starts train.py, sample.py or a function in fresh processes. Each is forked from a server process that has only
    imported torch: this takes a tenth of a second instead of four."""

    def __init__(self, folder):
        self.folder, self.started = Path(folder), 0
        self.server_end, other = socket.socketpair()
        code = (
            "import sys; sys.path[:0] = sys.argv[2:]; import training_helpers; training_helpers.serve(int(sys.argv[1]))"
        )
        paths = [str(path) for path in (ROOT, ROOT / "tests", *(ROOT / "tests").glob("*/")) if path.is_dir()]
        command = [sys.executable, "-c", code, str(other.fileno()), *paths]
        self.server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()])
        other.close()
        self.answers = self.server_end.makefile()

    def ask(self, *streams, **request):
        """Sends a request, with file descriptors for a process to start, and returns the answer."""
        socket.send_fds(self.server_end, [json.dumps(request).encode() + b"\n"], streams)
        return json.loads(self.answers.readline())

    def start(self, *command, env=None, cwd=None, kill_step=0):
        """Starts `train.py ARGS`, `sample.py ARGS` or `module.function ARGS` and returns a handle. A training process
        kills itself with SIGKILL instead of step number `kill_step` (from 1)."""
        self.started += 1
        output = self.folder / f"output-{self.started}"
        command = [str(word) for word in command]
        command += missing(command) if command[0] == "train.py" else []
        asked = {"command": command, "env": env or {}, "cwd": str(cwd or ROOT), "kill_step": kill_step}
        with open(os.devnull) as nothing, open(f"{output}.1", "wb") as stdout, open(f"{output}.2", "wb") as stderr:
            return output, self.ask(*(stream.fileno() for stream in (nothing, stdout, stderr)), **asked)["pid"]

    def wait(self, handle):
        """Returns the Outcome of a started process, once it has ended; its code is -9 if it was killed."""
        output, pid = handle
        code = self.ask(wait=pid)["code"]
        return Outcome(code, *(Path(f"{output}.{n}").read_text(encoding="utf-8") for n in (1, 2)))

    def run(self, *command, **options):
        return self.wait(self.start(*command, **options))

    def open(self, *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more):
        """Starts `module.function ARGS` and returns it as subprocess.Popen would, with the same meaning of the streams.
        With `terminal=True`, stdin is a terminal, which becomes that of the process."""
        return Forked(self, command, [stdin, stdout, stderr], more)

    def close(self):
        self.server_end.close()
        self.answers.close()
        self.server.wait(timeout=30)


class Forked:
    """A process that `Processes.open` has started: the part of subprocess.Popen that the tests use."""

    def __init__(self, processes, command, streams, more):
        ours, theirs = zip(*(self.ends(stream, number) for number, stream in enumerate(streams)), strict=True)
        descriptors = [
            theirs[1] if stream == subprocess.STDOUT else end for stream, end in zip(streams, theirs, strict=True)
        ]
        self.stdin, self.stdout, self.stderr = ours
        self.processes, self.returncode = processes, None
        asked = {"command": list(command), "env": {}, "cwd": str(ROOT), "terminal": False} | more
        self.pid = processes.ask(*descriptors, **asked)["pid"]
        for stream, end in zip(streams, theirs, strict=True):
            if stream in (subprocess.PIPE, subprocess.DEVNULL):
                os.close(end)

    @staticmethod
    def ends(stream, number):
        """Returns (a file for this process or None, the descriptor for the other one) of a stream as Popen takes it."""
        if stream == subprocess.DEVNULL:
            return None, os.open(os.devnull, os.O_RDWR)
        if stream != subprocess.PIPE:
            return None, stream if isinstance(stream, int) else stream.fileno()
        read, write = os.pipe()
        return (open(write, "wb"), read) if number == 0 else (open(read, "rb"), write)

    def poll(self):
        """Returns the exit code, or None while the process runs."""
        if self.returncode is None:
            self.returncode = self.processes.ask(poll=self.pid)["code"]
        return self.returncode

    def wait(self, timeout=60):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, data=b"", timeout=60):
        """Writes `data` to stdin; returns all of stdout and stderr, b"" for those that are no pipes, once the process
        has ended. Kills it after `timeout` seconds."""
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(data)
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda pipe: pipe.read() if pipe else b"", (self.stdout, self.stderr)))
        self.wait(timeout)
        killer.cancel()
        return found

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve(descriptor):
    """Answers the requests of a Processes until it closes the socket."""
    importlib.import_module("torch._dynamo")  # the first optimizer step of every process would
    importlib.import_module("generation_helpers")
    client = socket.socket(fileno=descriptor)
    while True:
        data, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
        while data and not data.endswith(b"\n"):
            data += client.recv(1 << 20)
        if not data:
            break
        request = json.loads(data)
        if "wait" in request or "poll" in request:
            pid, status = os.waitpid(request.get("wait") or request["poll"], 0 if "wait" in request else os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                client.close()
                take(streams, request.pop("terminal", None))
                become(**request)
            answer = {"pid": pid}
            for stream in streams:
                os.close(stream)
        client.sendall(json.dumps(answer).encode() + b"\n")


def take(streams, terminal):
    """Makes the descriptors `streams` the standard streams of this process."""
    if terminal:
        os.login_tty(streams[0])
    else:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    for stream in streams:
        with contextlib.suppress(OSError):  # closed by login_tty
            os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def become(command, env, cwd, kill_step=0):
    """Turns this process into the requested one, and exits with its code. Flushes the streams as the interpreter does
    at its end, but leaves out the rest of that end, which takes a second with torch."""
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, code = command, 1
    if kill_step:
        kill_at(kill_step)
    try:
        run_main(main_of(command))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)


def main_of(command):
    """Returns the function that runs a command: "train.py", "sample.py" or "module.function" with its arguments."""
    module, name = command[0].rsplit(".", 1)
    module = importlib.import_module(module)
    return module.main if name == "py" else lambda: getattr(module, name)(*command[1:])


def run_script(path, *args):
    """Runs `python PATH ARGS`, a path in this project, in this process."""
    sys.argv = [str(ROOT / path), *args]
    sys.path.insert(0, str((ROOT / path).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill_at(step):
    """Makes this process kill itself with SIGKILL instead of training step number `step`."""
    original, earlier_steps = train.train_step, iter(range(1, step))

    def train_step(*args):
        if next(earlier_steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    train.train_step = train_step


def state_of(out, step):
    return json.loads((out / f"step-{step:09d}/training/state.json").read_text())


def record_of(step):
    return {
        "step": step,
        "tokens": step * 100,
        "loss": 4.0 / (step + 1),
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tok_per_s": 5.0,
        "mfu": 0.1,
        "train_seconds": 2.0 * step,
    }


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def random_gradients(model, step, scale=1.0):
    """Random gradients like those of training: none for the padding of the vocabulary."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    model.token.weight.grad[model.vocab_size :] = 0
