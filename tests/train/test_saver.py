"""The Saver under kills and full disks: the newest complete checkpoint stays, and only what is old is deleted."""

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from file_systems import refuse
from training_helpers import optimizer_of, rewrite_manifest, save_step, snapshot, step_names, tiny_model

from gpt.checkpoint.read import load_pretrained, newest_checkpoint, verify_checkpoint
from gpt.errors import ResourceError
from gpt.text.tokenizer import load_tokenizer
from gpt.train.budget import Progress
from gpt.train.log import exit_record
from gpt.train.ranks import Ranks
from gpt.train.saver import Saver, apply_retention, locked_run_folder, sweep
from gpt.train.state import State

resource = pytest.importorskip("resource")

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.truncate")  # audit events
SAVE_EVENTS = 60  # a few more than one save with its retention has


def saver_of(out, model, keep_last=2, keep_every=0, step=0):
    """A Saver outside of any run, to save small checkpoints of `model` with."""
    progress = Progress(step=step)
    nothing = SimpleNamespace(wait=lambda: None, sync=lambda: None, read=lambda: None, state=lambda: {"scale": 1.0})
    nothing.log = nothing
    corpus = SimpleNamespace(verifier=nothing, tokenizer=load_tokenizer("byte"), shard_list={"train": []})
    rhythm = SimpleNamespace(keep_last=keep_last, keep_every=keep_every)
    constant = {"config": {"seed": 1}, "runtime": {}, "base": None}
    return Saver(out, State(model, optimizer_of(model), nothing, progress), corpus, nothing, constant, {}, rhythm)


# ---- kills


def save_until_killed(out, pipe, fatal_event=0):
    """In a forked child: restart from what is there as train.py does, then save a checkpoint a step, telling of each;
    with `fatal_event`, die at the n-th thing that the second save does to the file system."""
    sweep(out)
    found = newest_checkpoint(out)
    saver = saver_of(out, tiny_model(n_layer=1), keep_last=3, step=found.step if found else 0)
    while True:
        saver.state.progress.step += 1
        saver.state.progress.evaluated(100.0 - saver.state.progress.step if saver.state.progress.step % 3 else 200.0)
        if fatal_event and saver.state.progress.step == (found.step if found else 0) + 2:
            sys.addaudithook(functools.partial(die_at, iter(range(1, fatal_event)), str(out)))
            fatal_event = 0
        saver.save()
        os.write(pipe, b"%d\n" % saver.state.progress.step)


def die_at(left, out, event, arguments):
    """An audit hook: SIGKILL before the n-th change of something below `out`."""
    opened = event == "open" and arguments[1] not in ("r", "rb", None) and out in str(arguments[0])
    if (opened or event in CHANGES) and next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_saves(folder, events):
    """Fork and kill savers, one after another in one run folder, and check what each left: before the file operations
    of these numbers, or at a random moment for a 0. Runs in a process of its own that has done nothing yet; prints how
    many kills left something unfinished."""
    choose, out, unfinished = random.Random(0), Path(folder) / "run", 0
    torch.set_num_threads(1)
    tiny_model(n_layer=1)  # what is imported at first use is imported once
    for event in map(int, events.split(",")):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            save_until_killed(out, writer, event)
        os.close(writer)
        told = os.read(reader, 100)  # the first save of this child is complete
        if not event:
            time.sleep(choose.uniform(0, 0.12))
            os.kill(child, signal.SIGKILL)
        while more := os.read(reader, 4096):
            told += more
        os.close(reader)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        unfinished += check_leftovers(out, int(told.split()[-1]))
    print(unfinished)


def check_leftovers(out, told):
    """After a kill: the newest complete checkpoint is found and loads. Returns whether anything unfinished was left."""
    unfinished = any(out.rglob("*.tmp"))
    complete = [folder for folder in out.iterdir() if re.fullmatch(r"step-\d{9}", folder.name) and is_complete(folder)]
    found = newest_checkpoint(out)
    assert found.path == max(complete) and found.step >= told, (found, complete, told)
    load_pretrained(found.path)
    load_pretrained(out)
    sweep(out)
    assert not any(out.rglob("step-*.tmp"))
    assert not any(out.rglob("step-*/**/*.tmp"))
    return unfinished


def is_complete(folder):
    """Whether all files are there with the size that the manifest says, without asking the program."""
    manifest = json.loads((folder / "training/manifest.json").read_text())
    return all((folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())


def killed_savers(processes, folder, events):
    """How many of the kills left something unfinished, after all checks have passed."""
    done = processes.run("test_saver.kill_saves", folder, ",".join(map(str, events)))
    assert done.code == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_fault_040_kills_at_random_moments_leave_the_newest_complete_checkpoint(processes, tmp_path):
    assert killed_savers(processes, tmp_path, [0] * 12) > 0


def test_fault_040_kills_between_file_operations_leave_the_newest_complete_checkpoint(processes, tmp_path):
    assert killed_savers(processes, tmp_path, range(1, SAVE_EVENTS, 2)) > 10


@pytest.mark.slow
def test_fault_040_two_hundred_kills_at_random_moments_and_one_at_each_file_operation(processes, tmp_path):
    assert killed_savers(processes, tmp_path / "random", [0] * 200) > 50
    assert killed_savers(processes, tmp_path / "each", range(1, SAVE_EVENTS)) > 30


# ---- retention


def test_fault_046_retention_keeps_newest_best_and_every_nth_and_trainer_state_in_two(tmp_path):
    out, model = tmp_path / "run", tiny_model(n_layer=1)
    saver = saver_of(out, model, keep_last=3, keep_every=4)
    for step in range(1, 12):
        saver.state.progress.step = step
        saver.state.progress.evaluated(1.0 if step == 2 else 2.0)
        saver.save()
    assert step_names(out) == [f"step-{n:09d}" for n in (2, 4, 8, 9, 10, 11)]
    with_state = [n for n in (2, 4, 8, 9, 10, 11) if verify_checkpoint(out / f"step-{n:09d}", training=False).state]
    assert with_state == [10, 11]
    assert [path.parent.parent.name[-2:] for path in sorted(out.glob("step-*/training/optimizer.safetensors"))] == [
        "10",
        "11",
    ]
    assert load_pretrained(out / "step-000000002")[0].config.n_layer == 1


def test_fault_046_damaged_newer_folders_do_not_cost_a_valid_checkpoint(tmp_path):
    out = tmp_path / "run"
    for step in (1, 2, 3):
        save_step(out, step)
    for step in (3, 90, 91, 92):
        (out / f"step-{step:09d}/training").mkdir(parents=True, exist_ok=True)
        (out / f"step-{step:09d}/training/manifest.json").write_text("damaged")
    apply_retention(out, 2, keep_last=1, keep_every=0)
    assert newest_checkpoint(out).step == 2
    save_step(out, 3)
    apply_retention(out, 3, keep_last=1, keep_every=0)
    assert newest_checkpoint(out).step == 3


def test_fault_046_only_step_folders_are_ever_deleted(tmp_path):
    out = tmp_path / "run"
    for step in range(100, 106):
        save_step(out, step)
    others = ["step-100.backup", "foo-step-100", "step-100", "step-0000000001", "step-000000100.tmp.old", "notes"]
    for name in others:
        (out / name).mkdir()
        (out / name / "precious").write_text("x")
    (out / "step-000000077").write_text("a file, not a folder")
    apply_retention(out, 105, keep_last=2, keep_every=0)
    sweep(out)
    assert step_names(out) == sorted(
        [n for n in others if n.startswith("step-")] + ["step-000000077", "step-000000104", "step-000000105"]
    )
    assert all((out / name / "precious").exists() for name in others)


def test_fault_046_a_delete_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    for step in (1, 2, 3):
        save_step(tmp_path, step)

    def rename(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", rename)
    apply_retention(tmp_path, 3, keep_last=2, keep_every=0)
    assert re.search(r"warning: .*step-000000001: not deleted: Permission denied", capsys.readouterr().err)
    assert newest_checkpoint(tmp_path).step == 3


def test_fault_109_retention_leaves_links_and_what_they_lead_to_alone(tmp_path):
    out, home = tmp_path / "run", tmp_path / "home"
    save_step(home, 100)
    shutil.move(home / "step-000000100", tmp_path / "mine")
    for step in range(101, 105):
        save_step(out, step)
    (out / "step-000000100").symlink_to(tmp_path / "mine")
    (out / "step-000000099.tmp").symlink_to(tmp_path / "mine")
    shutil.move(out / "step-000000102/training", tmp_path / "training")
    (out / "step-000000102/training").symlink_to(tmp_path / "training")
    before = snapshot(tmp_path / "mine"), snapshot(tmp_path / "training")
    apply_retention(out, 104, keep_last=1, keep_every=0)
    sweep(out)
    assert (snapshot(tmp_path / "mine"), snapshot(tmp_path / "training")) == before
    assert (out / "step-000000100").is_symlink()
    assert not (out / "step-000000099.tmp").is_symlink()
    assert step_names(out) == ["step-000000100", "step-000000102", "step-000000104"]


def test_fault_109_saving_a_step_whose_name_is_a_link_replaces_the_link_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").write_text("x")
    (tmp_path / "run").mkdir()
    for name in ("step-000000005", "step-000000005.tmp"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    folder = save_step(tmp_path / "run", 5)
    assert not folder.is_symlink()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]


def test_a_trainer_state_dropped_halfway_is_dropped_at_the_next_save(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    manifest = json.loads((tmp_path / "step-000000001/training/manifest.json").read_text())
    weights_only = {n: e for n, e in manifest["files"].items() if not n.startswith("training/")}
    rewrite_manifest(tmp_path / "step-000000001", files=weights_only)  # as a kill right after this leaves it
    apply_retention(tmp_path, 3, keep_last=3, keep_every=0)
    assert [path.name for path in (tmp_path / "step-000000001/training").iterdir()] == ["manifest.json"]
    assert not verify_checkpoint(tmp_path / "step-000000001", training=False).state


# ---- writing that fails


def test_fault_037_041_a_full_disk_is_a_warning_twice_and_then_the_end_and_harms_no_checkpoint(tmp_path, capsys):
    saver = saver_of(tmp_path / "run", tiny_model())
    saver.state.progress.step = 1
    saver.save()
    before = snapshot(tmp_path / "run")
    largest = max(len(content) for content, _ in before.values() if isinstance(content, bytes))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for step, limit in ((2, largest - 1), (3, 4096)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            saver.state.progress.step = step
            saver.save()
            assert snapshot(tmp_path / "run") == before
        saver.state.progress.step = 4
        with pytest.raises(ResourceError, match=r"writing failed: .*GB free"):
            saver.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert capsys.readouterr().err.count("warning: checkpoint at step") == 2
    assert snapshot(tmp_path / "run") == before
    saver.save()
    assert newest_checkpoint(tmp_path / "run").step == 4


@pytest.mark.parametrize("name", ["rename", "replace", "fsync", "mkdir"])
def test_fault_054_a_save_whose_file_operations_fail_is_a_warning(name, tmp_path, monkeypatch, capsys):
    saver = saver_of(tmp_path / "run", tiny_model())
    saver.state.progress.step = 1
    saver.save()

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, name, fail)
    saver.state.progress.step = 2
    saver.save()
    monkeypatch.undo()
    assert "warning: checkpoint at step 2 failed" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "run").step in (1, 2)
    assert not list((tmp_path / "run").glob("step-*.tmp"))
    saver.save(is_last=True)
    assert newest_checkpoint(tmp_path / "run").step == 2


# ---- links that are none, and file systems that refuse


def saves(saver, *steps):
    for step in steps:
        saver.state.progress.step = step
        saver.state.progress.evaluated(10.0 - step)
        saver.save()


@pytest.mark.parametrize("name", ["latest", "best"])
def test_fault_129_a_real_folder_in_place_of_a_link_stays_and_is_a_warning_at_each_save(name, tmp_path, capsys):
    saver = saver_of(tmp_path, tiny_model(n_layer=1))
    saves(saver, 1)
    (tmp_path / name).unlink()
    shutil.copytree(tmp_path / "step-000000001", tmp_path / name)
    before = snapshot(tmp_path / name)
    saves(saver, 2, 3)
    warnings = re.findall(
        rf"warning: .*{name}: a folder, not a link: it stays as it is, {name}\.txt names (\S+);",
        capsys.readouterr().err,
    )
    assert warnings == ["step-000000002", "step-000000003"]
    assert snapshot(tmp_path / name) == before
    assert (tmp_path / f"{name}.txt").read_text() == "step-000000003\n"


@pytest.mark.parametrize("kind", ["file", "dangling", "link"])
def test_fault_129_a_file_or_another_link_in_place_of_a_link_is_replaced(kind, tmp_path, capsys):
    saver = saver_of(tmp_path, tiny_model(n_layer=1))
    (tmp_path / "other").mkdir()
    if kind == "file":
        (tmp_path / "latest").write_text("step-000000001")  # as some programs unpack a link
    else:
        (tmp_path / "latest").symlink_to("nowhere" if kind == "dangling" else "other")
    saves(saver, 1)
    assert os.readlink(tmp_path / "latest") == "step-000000001"
    assert capsys.readouterr().err == ""


def test_fault_122_links_that_are_refused_are_one_warning_and_the_pointers_do(tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, symlink="EOPNOTSUPP", chmod="EPERM", fsync="EINVAL")
    saver = saver_of(tmp_path, tiny_model(n_layer=1))
    saves(saver, 1, 2, 3)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert sum("does not make links" in warning for warning in warnings) == 1
    assert newest_checkpoint(tmp_path).step == 3
    assert not (tmp_path / "latest").exists()
    assert (tmp_path / "best.txt").read_text() == "step-000000003\n"


def test_fault_120_a_save_into_a_folder_that_is_gone_is_a_warning_twice_and_makes_no_folder(tmp_path, capsys):
    out = tmp_path / "run"
    with locked_run_folder(str(out), {}, [], Ranks()) as (_, check_in_place):
        saver = saver_of(out, tiny_model(n_layer=1))
        saver.check_in_place = check_in_place
        saves(saver, 1)
        out.rename(tmp_path / "moved")
        saves(saver, 2, 3)
        assert not out.exists()
        with pytest.raises(ResourceError, match="run: was deleted, moved or replaced while in use; put it back"):
            saves(saver, 4)
        (tmp_path / "moved").rename(out)
        saver.save()
    assert capsys.readouterr().err.count("warning: checkpoint at step") == 2
    assert newest_checkpoint(out).step == 4


def test_fault_120_the_best_of_a_moved_run_is_not_pointed_to_in_the_folder_of_another(tmp_path):
    out = tmp_path / "run"
    with locked_run_folder(str(out), {}, [], Ranks()) as (_, check_in_place):
        saver = saver_of(out, tiny_model(n_layer=1))
        saver.check_in_place = check_in_place
        saves(saver, 1)
        out.rename(tmp_path / "moved")
        with locked_run_folder(str(out), {}, [], Ranks()):
            saves(saver_of(out, tiny_model(n_layer=1)), 1)
            (out / "best.txt").unlink()  # it has the step, but no best one
            before = snapshot(out)
            with pytest.raises(ResourceError, match="was deleted, moved or replaced while in use"):
                saver.save()
            assert snapshot(out) == before


def test_fault_120_a_second_run_in_the_place_of_a_moved_folder_is_left_alone(tmp_path):
    out = tmp_path / "run"
    with locked_run_folder(str(out), {}, [], Ranks()) as (_, check_in_place):
        saver = saver_of(out, tiny_model(n_layer=1))
        saver.check_in_place = check_in_place
        saves(saver, 1)
        out.rename(tmp_path / "moved")
        with locked_run_folder(str(out), {}, [], Ranks()):
            before = snapshot(out)
            saves(saver, 2)
            with pytest.raises(ResourceError), exit_record(out, Ranks(), check_in_place):
                raise ResourceError("x: y; z")
            assert snapshot(out) == before
