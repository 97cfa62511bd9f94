"""When checkpoints are written and which are kept: the Saver of a run, its pointers, retention."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from gpt import __version__
from gpt.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    STEP_FOLDER,
    json_text,
    read_manifest,
    read_pointer,
    remove_tree,
    save_checkpoint,
    sealed,
    step_folders,
    step_of,
    warn,
    write_durably,
)
from gpt.errors import IntegrityError, ResourceError

TRAINER_STATES_KEPT = 2
FAILURES_ALLOWED = 2  # failed saves in a row that are only warnings


class Saver:
    """Writes the checkpoints of a run into `out` and keeps the pointers and the number of them right.

    `constant` is what every state.json repeats: the settings, the machine, the base model. `rhythm` says how many
    checkpoints to keep (keep_last, keep_every)."""

    def __init__(self, out, progress, model, optimizer, scaler, corpus, constant, log, rhythm):
        self.out, self.progress, self.model, self.optimizer, self.scaler = Path(out), progress, model, optimizer, scaler
        self.corpus, self.constant, self.log, self.rhythm = corpus, constant, log, rhythm
        self.saved_step, self.failures = None, 0
        if progress.step:
            self.continue_run()

    def save(self, is_best=False, is_last=False):
        """Save this step's checkpoint, unless there is one, and point to it. A failure to write is a warning until the
        third in a row, or at the end of the run."""
        step = self.progress.step
        if self.saved_step == step:
            return
        self.corpus.verifier.wait()
        try:
            self.write(step, is_best)
        except ResourceError as error:
            self.failures += 1
            if is_last or self.failures > FAILURES_ALLOWED:
                raise
            self.log.say(f"warning: checkpoint at step {step} failed: {error}")
            return
        self.saved_step, self.failures = step, 0
        apply_retention(self.out, step, self.rhythm.keep_last, self.rhythm.keep_every)

    def write(self, step, is_best):
        state = {"progress": asdict(self.progress), "scaler": self.scaler.state(), **self.constant}
        tokenizer, record = self.corpus.tokenizer, self.corpus.record
        try:
            self.log.sync()
            folder = save_checkpoint(self.out, step, self.model, self.optimizer, tokenizer, state, record, __version__)
            point(self.out, "latest", folder)
            if is_best:
                point(self.out, "best", folder)
        except OSError as error:
            raise ResourceError(f"{self.out}: {error.strerror}; free some space or make it writable") from None

    def continue_run(self):
        """Finish what an interruption right after the last save may have left undone."""
        best = self.out / f"step-{self.progress.best_step:09d}"
        if self.progress.best_loss is not None and best.is_dir() and read_pointer(self.out, "best") != best:
            point(self.out, "best", best)
        newest = self.out / f"step-{self.progress.step:09d}"
        if newest.is_dir():
            self.saved_step = self.progress.step
            point(self.out, "latest", newest)


def sweep(out):
    """Remove what an interrupted save or deletion left behind."""
    for path in Path(out).glob("step-*.tmp"):
        if STEP_FOLDER.match(path.name.removesuffix(".tmp")):
            remove_tree(path)
    for folder in step_folders(out):
        if not is_linked(folder):
            (folder / f"{MANIFEST}.tmp").unlink(missing_ok=True)


def point(out, name, folder):
    """Make `out/<name>.txt`, and the link `out/<name>` where the system has links, name `folder`."""
    write_durably(Path(out) / f"{name}.txt", folder.name + "\n")
    link, temporary = Path(out) / name, Path(out) / f"{name}.tmp"
    if link.exists() and not link.is_symlink():
        return
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        os.replace(temporary, link)
    except (OSError, NotImplementedError):  # the text file is what counts
        return


def is_linked(folder):
    """Whether a step folder leads elsewhere through a link: nothing is deleted there."""
    return folder.is_symlink() or (folder / "training").is_symlink()


def apply_retention(out, saved, keep_last, keep_every):
    """Delete step folders other than the newest `keep_last`, the best and every `keep_every`-th; of those kept, only
    the newest two keep their trainer state. Counted from step `saved`, just written: folders beyond it are damaged ones
    that a resume has passed over, and stay. What cannot be deleted is one warning."""
    folders = [folder for folder in step_folders(out) if step_of(folder) <= saved and not is_linked(folder)]
    best = read_pointer(out, "best")
    newest = folders[: max(keep_last, 1)]
    for place, folder in enumerate(folders):
        kept = folder in newest or folder == best or (keep_every and step_of(folder) % keep_every == 0)
        try:
            if not kept:
                remove_step(folder)
            elif place >= TRAINER_STATES_KEPT:
                drop_trainer_state(folder)
        except OSError as error:
            warn(f"{folder}: not deleted: {error.strerror}")


def remove_step(folder):
    """Delete a step folder: it loses its name first, so that no half of one can be taken for a checkpoint."""
    doomed = folder.with_name(folder.name + ".tmp")
    remove_tree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def drop_trainer_state(folder):
    """Make a checkpoint one of weights only. The manifest changes first: what it does not list is not read."""
    try:
        manifest = read_manifest(folder)
    except (IntegrityError, ResourceError):
        return  # damaged or unreadable: left as it is, for the user to judge
    files = {name: entry for name, entry in manifest["files"].items() if name not in (OPTIMIZER, STATE)}
    if files != manifest["files"]:
        write_durably(folder / MANIFEST, json_text(sealed(manifest | {"files": files})))
    for name in (OPTIMIZER, STATE):
        (folder / name).unlink(missing_ok=True)
