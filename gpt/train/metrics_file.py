"""metrics.jsonl: one JSON record per logged step, written during training and read back afterwards."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from gpt.errors import ResourceError, note
from gpt.files import in_place, no_link, write_durably

METRICS = "metrics.jsonl"


class MetricsFile:
    """metrics.jsonl, opened to append one record per line. Keeps what a full disk refuses and writes it later. Removes
    the lines of steps after `step`; -1 removes all. Raises ResourceError if the file cannot be opened."""

    def __init__(self, path: Path, step: int):
        self.path, self.unwritten, self.told = path, bytearray(), False
        try:
            self.last_line = cut_metrics(path, step)  # the last line when the file was opened
            self.file = open(path, "ab", buffering=0, opener=no_link)
            self.is_watched = in_place(path, self.file.fileno())  # not where inodes change by themselves
        except OSError as error:
            raise self.refused(error) from None

    def refused(self, error: OSError) -> ResourceError:
        advice = "give the command again" if isinstance(error, FileNotFoundError) else "free some space"
        return ResourceError(f"{self.path}: {error.strerror}; {advice} or make it writable")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. If writing fails, warns once and keeps the record for later."""
        record = {name: finite_or_none(value) for name, value in record.items()}
        try:
            record = self.merged(record)
            self.unwritten += (json.dumps(record) + "\n").encode()
            self.flush()
        except OSError as error:
            if not self.told:
                note("warning", f"{self.path}: {error.strerror}; what it lacks is kept until it can be written")
            self.told = True

    def merged(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns `record`, merged with the last line of the file if that has the same step: an earlier process wrote
        it before its evaluation was cut short. Removes that line from the file."""
        line, self.last_line = self.last_line, ""
        if not line or json.loads(line)["step"] != record["step"]:
            return record
        self.file.truncate(self.file.tell() - len(line) - 1)
        return json.loads(line) | record

    def in_place(self) -> bool:
        """Returns whether the file has its path still: False after it was deleted, moved, replaced or closed."""
        return not self.file.closed and (not self.is_watched or in_place(self.path, self.file.fileno()))

    def flush(self) -> None:
        """Writes all records to the file. Raises OSError if that fails, or if the file was deleted or replaced."""
        if not self.in_place():
            raise FileNotFoundError(errno.ENOENT, "was deleted, moved or replaced while training")
        while self.unwritten:
            del self.unwritten[: self.file.write(self.unwritten)]
        self.told = False

    def sync(self) -> None:
        """Flushes all records to the disk. Raises ResourceError if that fails."""
        try:
            self.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self.refused(error) from None

    def close(self) -> None:
        """Writes what is still unwritten and closes the file. If writing fails, warns how many lines are lost."""
        try:
            self.flush()
        except OSError as error:
            note("warning", f"{self.path}: {error.strerror}; its last {self.unwritten.count(10)} lines are lost")
        self.file.close()


def logged_evaluation(out: Path, step: int) -> float | None:
    """Returns the validation loss that the metrics of a run have for a step, or None if they have none."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    losses = [record.get("val_loss") for record in map(parse_record, lines) if record and record["step"] == step]
    return losses[-1] if losses else None


def cut_metrics(path: Path, step: int) -> str:
    """Removes the lines beyond `step`, which an interrupted run may have written after its last checkpoint, and an
    unfinished last line. Returns the last line that stays, or ""."""
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last is empty, or unfinished
    kept = [line for line in lines[:-1] if (record := parse_record(line)) and record["step"] <= step]
    if kept != lines[:-1] or lines[-1]:
        write_durably(path, "".join(line + "\n" for line in kept))
    return kept[-1] if kept else ""


def finite_or_none(value: float) -> float | None:
    """Returns `value`, or None for NaN and infinity, which JSON does not have. They come from a skipped fp16 step."""
    return value if math.isfinite(value) else None


def parse_record(line: str) -> dict[str, Any] | None:
    """Returns the record in a line of metrics.jsonl, or None if the line is damaged or has no step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int and record["step"] in range(1 << 53)
    return record if is_record else None
