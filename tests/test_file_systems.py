"""All programs on file systems that refuse what most allow: nothing changes but one warning for each refusal."""

import json
import os

import prepare
import pytest
from file_systems import refuse, shim
from training_helpers import QUICK, fingerprint, in_process, text_of, train_here

import sample
from gpt.report import plot

REFUSALS = {"fsync": "EINVAL", "chmod": "EPERM", "symlink": "EOPNOTSUPP", "flock": "ENOLCK"}
WARNINGS = {
    "fsync": "does not flush folders",
    "chmod": "does not change permissions",
    "symlink": "does not make links",
    "flock": "cannot be locked",
}
RUN = ("--max_steps", 4, "--warmup_steps", 0, "--eval_every", 2, "--save_every", 2, "--log_every", 1)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(text_of(4000), encoding="utf-8")
    return tmp_path / "text.txt"


def use_all(text, folder):
    """Prepares, trains, continues, samples to a file and draws, in `folder`; returns all that was printed."""
    data, out = folder / "data", folder / "out"
    outcomes = [in_process(prepare.main, "prepare.py", text, "--out", data, "--tokenizer", "byte")]
    for steps in (4, 6):
        outcomes.append(train_here("tiny", "--data", data, "--out", out, *RUN[2:], "--max_steps", steps))
    words = [
        "--max_new_tokens",
        5,
        "--seed",
        1,
        "--device",
        "cpu",
        "--backend",
        "eager",
        "--out",
        folder / "text.jsonl",
    ]
    outcomes.append(in_process(sample.main, "sample.py", out, "--prompts", text.parent / "prompts.txt", *words))
    outcomes.append(in_process(plot.main, "plot", out, "--out", folder / "loss.png"))
    for outcome in outcomes:
        assert outcome.code == 0, outcome.stderr
    return "".join(outcome.stderr for outcome in outcomes)


@pytest.mark.parametrize("refused", [*REFUSALS, "all"])
def test_fault_122_all_programs_do_on_a_refusing_file_system_what_they_do_elsewhere(
    text, tmp_path, monkeypatch, refused
):
    pytest.importorskip("matplotlib", reason="needs matplotlib, the extra [plot]")
    (tmp_path / "prompts.txt").write_text("the sea\nonce\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    use_all(text, tmp_path / "there")
    names = list(REFUSALS) if refused == "all" else [refused]
    refuse(monkeypatch, **{name: REFUSALS[name] for name in names})
    printed = use_all(text, tmp_path / "here")
    for name, warning in WARNINGS.items():
        expected = 0 if name not in names else 2 if name == "flock" else 1  # each run warns that it has no lock
        assert printed.count(warning) == expected, printed
    assert fingerprint(tmp_path / "here/out", 6) == fingerprint(tmp_path / "there/out", 6)
    texts = [json.loads(line)["text"] for line in (tmp_path / "here/text.jsonl").read_text().splitlines()]
    assert texts == [json.loads(line)["text"] for line in (tmp_path / "there/text.jsonl").read_text().splitlines()]
    assert os.path.islink(tmp_path / "here/out/latest") == ("symlink" not in names)


@pytest.mark.parametrize(
    "refused", ["dirfsync=EIO", "chmod=EPERM", "dirfsync=ENOTSUP chmod=EACCES symlink=EPERM flock=ENOLCK"]
)
def test_fault_122_a_run_is_killed_and_goes_on_on_the_file_system_of_the_shim(text, tmp_path, processes, refused):
    path, data, out = shim(), tmp_path / "data", tmp_path / "out"
    assert in_process(prepare.main, "prepare.py", text, "--out", data, "--tokenizer", "byte").code == 0
    words = ["tiny", "--data", data, "--out", out, *RUN, *QUICK]
    on_shim, env = ("file_systems.run_on_shim", path), {"FS_SHIM": refused}
    for kill_step in (4, 0):
        done = processes.run(*on_shim, "train", *words, env=env, kill_step=kill_step)
        assert done.code == (-9 if kill_step else 0), done.stderr
    for answer in refused.split():
        warning = WARNINGS[answer.split("=")[0].replace("dirfsync", "fsync")]
        assert done.stderr.count(warning) == 1, done.stderr
    again = tmp_path / "again"
    prepared = processes.run(*on_shim, "prepare", text, "--out", again, "--tokenizer", "byte", env=env)
    assert prepared.code == 0, prepared.stderr
    assert (again / "train_000000.bin").read_bytes() == (data / "train_000000.bin").read_bytes()
