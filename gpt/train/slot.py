"""The time slot of a command, --stop_after_minutes: when to stop so that the last checkpoint is written before its end.

    start of the command                                            stop here          end of the slot
    |-- imports, model --|-- steps, evaluations, checkpoints ... ---|-- step --|-- save --|

The time for a step and for a save are those of the longest so far."""

import math
import os
import sys
import time
from pathlib import Path

SAVE_SECONDS, SAVE_SPEED = 0.3, 1e8  # a guess until the first save: seconds, and bytes per second
SAFETY = 1.5  # times the longest save so far: the next may take longer


class Slot:
    """The slot of this command: `minutes` from its start; 0 has no end. `save_bytes`: the size of a checkpoint."""

    def __init__(self, minutes: float, save_bytes: int = 0):
        now = time.monotonic()
        self.end = now - command_seconds() + 60 * minutes if minutes else math.inf
        self.last_question, self.longest_gap, self.is_over = now, 0.0, False
        self.save_seconds, self.saved_since = SAVE_SECONDS + save_bytes / SAVE_SPEED, 0.0

    def over(self) -> bool:
        """Returns whether to stop now. Once True, stays True. Ask once per step: the longest time between two questions
        is what the next step may take."""
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - self.last_question - self.saved_since)
        self.last_question, self.saved_since = now, 0.0
        self.is_over = self.is_over or self.seconds_left() <= 0
        return self.is_over

    def seconds_left(self) -> float:
        """Returns the seconds that are left for steps."""
        return self.end - time.monotonic() - self.longest_gap - SAFETY * self.save_seconds

    def saved(self, seconds: float) -> None:
        """Takes how long a save took."""
        self.save_seconds = max(self.save_seconds, seconds)
        self.saved_since += seconds


def command_seconds() -> float:
    """Returns the seconds since this process was started for the present command; 0.0 if it was started for another
    one, such as the tests. Where the system does not tell the time, returns the CPU time used."""
    words = sys.argv[1:]
    if not words or sys.orig_argv[-len(words) :] != words:
        return 0.0
    try:
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # clock ticks after boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
