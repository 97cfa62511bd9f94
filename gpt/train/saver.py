"""A run's folder: when checkpoints are written there, what points to them, and which are kept."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt import __version__
from gpt.checkpoint.read import MANIFEST, OPTIMIZER, STATE, TRAINER_FILES, read_manifest, sealed
from gpt.checkpoint.write import save_checkpoint, write_json
from gpt.config import to_toml
from gpt.errors import IntegrityError, ResourceError, note
from gpt.files import (
    STEP_FOLDER,
    lock_folder,
    read_pointer,
    remove_tree,
    step_folders,
    step_number,
    warn_refused,
    write_durably,
)
from gpt.text.corpus import Corpus
from gpt.train.log import Recorder
from gpt.train.lora import adapter_files, merged
from gpt.train.ranks import Ranks
from gpt.train.slot import Slot
from gpt.train.state import State, optimizer_tensors

TRAINER_STATES_KEPT = 2
FAILURES_ALLOWED = 2  # failed saves in a row that are only warnings


@contextlib.contextmanager
def locked_run_folder(
    out: str, settings: dict, newest: list[Path], ranks: Ranks
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields the run folder, and a function that raises ResourceError if another folder or none has taken its place.
    Rank 0 creates and locks the folder, writes the settings and removes what an interrupted save left. `newest`: the
    newest step folder seen before locking ([] if none). Raises ResourceError if another run uses the folder or has
    saved there since then."""
    folder = Path(out)
    if not ranks.leads:
        yield folder, lambda: None
        return
    with write_errors(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder) as check_in_place:
        if step_folders(folder)[:1] != newest:
            raise ResourceError(f"{folder}: another run has just saved a checkpoint there; give the command again")
        with write_errors(folder, "give another --out"):
            sweep(folder)
            values = {name: value for name, value in settings.items() if name != "resume"}
            heading = "# python train.py THIS_FILE --out NEW repeats this run\n"
            write_durably(folder / "config.toml", heading + to_toml(values))
        yield folder, check_in_place


@contextlib.contextmanager
def write_errors(path: Path, advice: str) -> Iterator[None]:
    """Turns an OSError into a ResourceError about `path` that ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


class Saver:
    """Writes the checkpoints of a run into `out`, points to the latest and the best, and deletes old ones.

    `constant` holds the entries that are the same in every state.json: the settings, the machine, the base model.
    `sampling` are the defaults of generation. `rhythm` says how many checkpoints to keep (keep_last, keep_every).
    `check_in_place()` raises ResourceError if `out` is no longer the folder of this run; `slot` learns how long saves
    take. Ranks whose `recorder` has no log write nothing."""

    def __init__(
        self,
        out: Path,
        state: State,
        corpus: Corpus,
        recorder: Recorder,
        constant: dict,
        sampling: dict,
        rhythm: Any,
        check_in_place: Callable[[], None] = lambda: None,
        slot: Slot | None = None,
    ):
        self.out, self.state, self.corpus, self.constant = Path(out), state, corpus, constant
        self.recorder, self.sampling, self.rhythm = recorder, sampling, rhythm
        self.check_in_place = check_in_place
        self.slot = slot or Slot(0)
        self.saved_step: int | None = None
        self.failures = 0
        if recorder.log and self.folder(state.progress.step).is_dir():  # finish what an interruption left undone
            self.saved_step = state.progress.step
            self.point()

    def folder(self, step: int) -> Path:
        return self.out / f"step-{step:09d}"

    def save(self, is_last: bool = False) -> None:
        """Saves a checkpoint of this step, unless it is saved already, and points to it. First reads the numbers of the
        step, which raises NonFiniteError if they are not finite. A failure to write is a warning; after
        FAILURES_ALLOWED warnings in a row, or if `is_last`, it raises ResourceError."""
        self.recorder.read()
        if not self.recorder.log:
            return
        step = self.state.progress.step
        if self.saved_step == step:
            self.point_to_best()  # a resumed run may have evaluated a step that was saved before
            return
        self.corpus.verifier.wait()
        started = time.monotonic()
        try:
            self.write(step)
        except ResourceError as error:
            self.failures += 1
            if is_last or self.failures > FAILURES_ALLOWED:
                raise
            note("warning", f"checkpoint at step {step} failed: {error}")
            return
        self.saved_step, self.failures = step, 0
        apply_retention(self.out, step, self.rhythm.keep_last, self.rhythm.keep_every)
        self.slot.saved(time.monotonic() - started)

    def write(self, step: int) -> None:
        state, corpus = self.state, self.corpus
        stored = {"progress": asdict(state.progress), "scaler": state.scaler.state(), **self.constant}
        files = {OPTIMIZER: optimizer_tensors(state.model, state.optimizer), STATE: stored}
        files |= adapter_files(state.model, self.constant["base"])
        about = {"dataset": corpus.shard_list, "code": __version__}
        with write_errors(self.out, "free some space or make it writable"):
            self.check_in_place()
            assert self.recorder.log
            self.recorder.log.sync()
            model = merged(state.model, for_file=True)
            save_checkpoint(self.out, step, model, corpus.tokenizer, files, self.sampling, about)
            self.point()

    def point(self) -> None:
        """Points `latest` to the checkpoint of this step, and `best` to that of the best step."""
        point(self.out, "latest", self.folder(self.state.progress.step))
        self.point_to_best()

    def point_to_best(self) -> None:
        progress = self.state.progress
        best = self.folder(progress.best_step)
        if progress.best_loss is not None and best.is_dir() and read_pointer(self.out, "best") != best:
            self.check_in_place()
            point(self.out, "best", best)


def sweep(out: Path) -> None:
    """Removes what an interrupted save or deletion left behind."""
    for path in out.glob("step-*.tmp"):
        if STEP_FOLDER.match(path.name.removesuffix(".tmp")):
            remove_tree(path)
    for folder in step_folders(out):
        if not is_linked(folder):
            (folder / f"{MANIFEST}.tmp").unlink(missing_ok=True)


def point(out: Path, name: str, folder: Path) -> None:
    """Writes the name of `folder` to `out/<name>.txt`, and links `out/<name>` to `folder` if the system has links.
    Warns if a real folder is in the link's place: it may be all that is left of a checkpoint."""
    with write_errors(out / f"{name}.txt", "free some space or make it writable"):
        write_durably(out / f"{name}.txt", folder.name + "\n")
    link, temporary = out / name, out / f"{name}.tmp"
    if link.is_dir() and not link.is_symlink():  # made by zip or cp -L
        note("warning", f"{link}: a folder, not a link: it stays as it is, {name}.txt names {folder.name}; delete it")
        return
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, link)
    except (OSError, NotImplementedError) as error:  # the text file decides; a link that cannot follow it must go
        reason = getattr(error, "strerror", None) or str(error)
        warn_refused("make links", reason, "latest.txt and best.txt alone name the checkpoints")
        with contextlib.suppress(OSError):
            link.unlink()


def is_linked(folder: Path) -> bool:
    """Returns whether a step folder, or its training folder, is a symbolic link. Nothing is deleted through a link."""
    return folder.is_symlink() or (folder / "training").is_symlink()


def apply_retention(out: Path, saved: int, keep_last: int, keep_every: int) -> None:
    """Deletes step folders, except the newest `keep_last`, the best, and those whose step is a multiple of `keep_every`
    (0: none). Drops the trainer state of all but the newest TRAINER_STATES_KEPT. Folders beyond step `saved`, just
    written, stay: they are damaged ones that a resume passed over. Warns of a folder that cannot be deleted."""
    folders = [folder for folder in step_folders(out) if step_number(folder) <= saved and not is_linked(folder)]
    best = read_pointer(out, "best")
    newest = folders[: max(keep_last, 1)]
    for place, folder in enumerate(folders):
        kept = folder in newest or folder == best or (keep_every and step_number(folder) % keep_every == 0)
        try:
            if not kept:
                remove_step(folder)
            elif place >= TRAINER_STATES_KEPT:
                drop_trainer_state(folder)
        except OSError as error:
            note("warning", f"{folder}: not deleted: {error.strerror}")


def remove_step(folder: Path) -> None:
    """Deletes a step folder. Renames it first, so that a half-deleted folder cannot be taken for a checkpoint."""
    doomed = folder.with_name(folder.name + ".tmp")
    remove_tree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def drop_trainer_state(folder: Path) -> None:
    """Reduces a checkpoint to its weights. Changes the manifest first: files that it does not list are not read."""
    try:
        manifest = read_manifest(folder)
    except (IntegrityError, ResourceError):
        return  # damaged or unreadable: the user decides
    files = {name: entry for name, entry in manifest["files"].items() if name not in TRAINER_FILES}
    if files != manifest["files"]:
        write_json(folder / MANIFEST, sealed(manifest | {"files": files}))
    for name in TRAINER_FILES:
        (folder / name).unlink(missing_ok=True)
