"""Shared fixtures: GPT-2's tokenizer files and a text from GPT_TEST_ASSETS, native kernels, processes, stand-ins."""

import atexit
import http.server
import os
import shutil
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paths  # noqa: F401 (sets sys.path)
import pytest


def asset(name):
    """Returns the path of a file or folder in the folder GPT_TEST_ASSETS. Skips the test if it does not exist."""
    assets = os.environ.get("GPT_TEST_ASSETS")
    path = Path(assets).absolute() / name if assets else None
    if path is None or not path.exists():
        pytest.skip(f"needs {name}: set GPT_TEST_ASSETS to a folder that holds it (see README, Install)")
    return path


@pytest.fixture(scope="session")
def bpe_cache():
    """Returns the folder of tiktoken's downloaded files, gpt2's included, and sets TIKTOKEN_CACHE_DIR to it."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(given).absolute() if given else asset("tiktoken_cache")
    if not (folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists():
        pytest.skip(f"needs gpt2's tokenizer files: {folder} is not a cache that tiktoken has filled with them")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tinyshakespeare():
    """Returns the path of tinyshakespeare.txt (1,115,394 bytes)."""
    return asset("corpora/tinyshakespeare.txt")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background: the programs tested would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait do not spin: the machine may be busy

# Tests must not depend on kernels that this user has built: they get an empty cache, in which every build has failed.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gpt-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def without_kernels():
    """Marks all builds of kernels in the cache folder as failed."""
    from gpt.files import make_private
    from gpt.kernels import build

    for path in map(build.library_path, build.SOURCES):
        if path is not None:
            make_private(path.parent)
            build.failed_marker(path).touch()


without_kernels()


@pytest.fixture(scope="session")
def kernels_cache(tmp_path_factory):
    """Builds the native kernels once and returns their cache folder, for XDG_CACHE_HOME."""
    from gpt.kernels import build

    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(build, "WAIT_SECONDS", build.BUILD_SECONDS)  # the machine may be busy or emulated
        with ThreadPoolExecutor() as threads:
            libraries = dict(zip(build.SOURCES, threads.map(build.build_now, build.SOURCES), strict=True))
        assert None not in libraries.values(), libraries
        return os.environ["XDG_CACHE_HOME"]


@pytest.fixture
def kernels(kernels_cache, monkeypatch):
    """Makes the native kernels available during a test, and returns the library that generates."""
    from gpt.kernels import build

    monkeypatch.setenv("XDG_CACHE_HOME", kernels_cache)
    return build.load_library()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Returns a training_helpers.Processes: other processes for tests that kill, signal or need a clean start."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    from training_helpers import Processes

    processes = Processes(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.close()


@pytest.fixture
def start(processes):
    """start(*flags, before="", **streams): starts sample.py with a small random model as every checkpoint, after the
    lines `before`; see Processes.open."""

    def start(*flags, before="", **settings):
        return processes.open("generation_helpers.sample_after", before, *map(str, flags), **settings)

    return start


@pytest.fixture
def cpu():
    """A Runtime in fp32 on one thread of a CPU; torch's settings are put back afterwards."""
    import torch

    from gpt.train.runtime import MachineConfig, Runtime

    threads = torch.get_num_threads()
    yield Runtime(MachineConfig(device="cpu", dtype="fp32", threads=1))
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """Sets torch to one thread during a test, for models so small that a second thread only costs time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def server():
    """Starts a loopback server. Returns its address and a dictionary of its answers: path -> bytes, or the address to
    redirect to."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = files.get(self.path)
            self.send_response({bytes: 200, str: 302}.get(type(answer), 404))
            if isinstance(answer, str):
                self.send_header("Location", answer)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else b"")

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", files
        running.shutdown()
