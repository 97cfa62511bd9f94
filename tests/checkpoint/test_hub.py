"""Models by hub name, from a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import http.server
import json
import socket
import threading
import urllib.parse

import pytest
import torch
from checkpoint_helpers import pickle_weights
from foreign_helpers import write
from safetensors.torch import load_file, save_file
from training_helpers import make_data, metrics, save_step, tiny_model, train_here

from gpt.checkpoint.adapters import ADAPTER
from gpt.checkpoint.read import find_model_folder
from gpt.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("gpt2", "someone/tiny-gpt2")


class Hub:
    """A server of one folder as the models NAMES; counts the requests, and can be shut down."""

    def __init__(self, folder):
        self.folder, self.requests = folder, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.requests.append(self.path)
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                """Says nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler):
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        for name in NAMES:
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                files = [{"rfilename": file} for file in self.files()]
                return self.reply(handler, json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode())
            if path.startswith(f"/api/models/{name}/tree/"):
                return self.reply(handler, json.dumps([self.entry(file) for file in self.files()]).encode())
            if path.startswith(f"/{name}/resolve/"):
                file = self.folder / path.split("/resolve/")[1].split("/", 1)[1]
                if file.is_file():
                    return self.reply(handler, file.read_bytes())
        return self.reply(handler, b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

    def files(self):
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def entry(self, name):
        content = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def reply(self, handler, content, status=200, headers=None):
        handler.send_response(status)
        etag = hashlib.sha1(content).hexdigest()
        known = {"Content-Length": str(len(content)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        for key, value in (known | (headers or {})).items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path):
    """A Hub that serves a tiny GPT-2 with a few files beside it that nobody should fetch."""
    folder = save_step(tmp_path / "served", 1, tiny_model(n_embd=32, seed=4))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("# model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    made = Hub(folder)
    yield made
    made.stop()


@pytest.fixture
def environment(hub, tmp_path):
    """For a process of its own: the hub's address and an empty cache."""
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")
    return proxies | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_CACHE": str(tmp_path / "cache/hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def sample(processes, environment, tmp_path):
    """`sample(name)` runs sample.py with that name, in an empty folder."""

    def command(name):
        flags = ("--prompt", "the sea", "--temperature", "0", "--max_new_tokens", "8", "--dtype", "fp32")
        return processes.run("sample.py", name, *flags, env=environment, cwd=tmp_path)

    return command


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_name_is_sampled_like_the_folder_and_comes_from_the_cache_when_the_hub_is_down(name, hub, sample):
    expected = sample(hub.folder)
    first = sample(name)
    assert (first.code, first.stdout) == (0, expected.stdout), first.stderr
    fetched = {path.rsplit("/", 1)[1] for path in hub.requests if "/resolve/" in path}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not {"pytorch_model.bin", "README.md", "optimizer.safetensors"} & fetched
    hub.stop()
    second = sample(name)
    assert (second.code, second.stdout) == (0, expected.stdout), second.stderr


def test_pickled_weights_are_fetched_where_there_are_no_others(hub, sample):
    expected = sample(hub.folder)
    pickle_weights(hub.folder)
    (hub.folder / "training_args.bin").write_bytes(b"never fetched")
    assert sample("gpt2").stdout == expected.stdout
    fetched = {path.rsplit("/", 1)[1] for path in hub.requests if "/resolve/" in path}
    assert "pytorch_model.bin" in fetched
    assert "training_args.bin" not in fetched
    hub.stop()
    second = sample("gpt2")
    assert (second.code, second.stdout) == (0, expected.stdout), second.stderr


def test_an_adapter_here_finds_its_base_on_the_hub_and_one_there_is_taken_by_name(hub, sample, tmp_path):
    expected = sample(hub.folder)
    folder = tmp_path / "adapter"
    write(folder, adapter_config={"peft_type": "LORA", "base_model_name_or_path": "gpt2", "lora_alpha": 4})
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    save_file({f"{name}A.weight": torch.ones(1, 32), f"{name}B.weight": torch.zeros(96, 1)}, folder / ADAPTER)
    done = sample(folder)
    assert (done.code, done.stdout) == (0, expected.stdout), done.stderr
    settings = json.loads((folder / "adapter_config.json").read_text())
    write(folder, adapter_config=settings | {"base_model_name_or_path": "someone/else"})
    done = sample(folder)
    assert done.code == 2
    assert "an adapter; its base, by adapter_config.json: someone/else: neither a folder here nor" in done.last
    for path in hub.folder.iterdir():
        if path.is_file():
            path.unlink()
    write(hub.folder, adapter_config=settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    (folder / ADAPTER).rename(hub.folder / ADAPTER)
    assert f"its base, by adapter_config.json: {tmp_path / 'gone'}" in sample("someone/tiny-gpt2").last


def test_init_takes_a_hub_name(hub, processes, environment, tmp_path):
    data = make_data(tmp_path / "data", train_size=2000)
    settings = ("--max_steps", "2", "--lr", "1e-9", "--warmup_steps", "0", "--global_batch_size", "4")
    command = ("finetune", "--init", "someone/tiny-gpt2", "--data", data, "--out", tmp_path / "tuned", *settings)
    done = processes.run("train.py", *command, env=environment, cwd=tmp_path)
    assert done.code == 0, done.stderr
    ours = load_file(tmp_path / "tuned/step-000000002/model.safetensors")["transformer.wpe.weight"]
    theirs = load_file(hub.folder / "model.safetensors")["transformer.wpe.weight"]
    assert (ours - theirs).abs().max() < 1e-6
    assert [record["step"] for record in metrics(tmp_path / "tuned")][-1] == 2
    state = json.loads((tmp_path / "tuned/step-000000002/training/state.json").read_text())
    content = (hub.folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(hashlib.sha256(content).hexdigest().encode()).hexdigest()
    assert state["base"] == {"init": "someone/tiny-gpt2", "model": "someone/tiny-gpt2", "sha256": digest}


def test_a_name_the_hub_does_not_know_is_exit_2(sample, processes, environment, tmp_path):
    for name in ("gpt3", "someone/else"):
        done = sample(name)
        assert done.code == 2
        assert done.last.startswith(f"error: {name}: neither a folder here nor a model on the hub")
    command = ("tiny", "--init", "someone/else", "--data", "data", "--out", tmp_path / "new")
    assert processes.run("train.py", *command, env=environment, cwd=tmp_path).code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a--b", "a..b", "x" * 200])
def test_a_name_that_no_model_can_have_is_exit_2(name, sample):
    assert sample(name).code == 2


def test_a_hub_that_is_down_without_a_cache_is_exit_5(hub, sample):
    hub.stop()
    done = sample("gpt2")
    assert done.code == 5
    assert done.last.startswith("error: gpt2: not in the cache, and the hub cannot be reached")


def test_a_hub_that_never_answers_is_given_up_and_the_cache_used(hub, processes, environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silenced = environment | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        command = ("test_hub.fetch_impatiently", "gpt2")
        empty = processes.run(*command, env=silenced, cwd=tmp_path)
        assert empty.code == 5, empty.stderr
        assert "cannot be reached" in empty.last
        assert processes.run(*command, env=environment, cwd=tmp_path).code == 0
        cached = processes.run(*command, env=silenced, cwd=tmp_path)
        assert cached.code == 0, cached.stderr
        assert COMMIT in cached.stdout


def fetch_impatiently(name):
    """Prints the folder of a hub model; waits one second for the hub's answer instead of ten."""
    from gpt.checkpoint import hub

    hub.TIMEOUT_SECONDS = 1
    print(hub.fetch_from_hub(name))


def test_a_cache_without_the_weights_is_exit_5_when_the_hub_is_down(hub, sample, tmp_path):
    assert sample("gpt2").code == 0
    hub.stop()
    for path in (tmp_path / "cache").rglob("model.safetensors"):
        path.unlink()
    done = sample("gpt2")
    assert done.code in (2, 5)
    assert "gpt2" in done.last


@pytest.mark.parametrize("name", ["out/mine", "no/such/folder", "../gpt2", "/absent", "-x", "", "gpt2\n", "a b"])
def test_what_cannot_be_a_hub_name_is_never_looked_up(name, monkeypatch):
    monkeypatch.setattr("gpt.checkpoint.read.fetch_from_hub", lambda name: pytest.fail("looked up"))
    with pytest.raises(InputError):
        find_model_folder(name)


def test_init_by_a_path_that_is_not_there_is_exit_2(tmp_path):
    done = train_here("tiny", "--init", tmp_path / "absent", "--data", tmp_path, "--out", tmp_path / "new")
    assert done.code == 2
    assert "no such checkpoint folder" in done.last
