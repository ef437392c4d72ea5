"""A job's progress in words."""

from __future__ import annotations

from batchrun.runner.live import HOOK, START, Progress

PHASES = {
    START: "starting",
    "load": "loading the model",
    "compile": "compiling",
    "check": "checking the model",
    "run": "running",
    "export": "writing the output",
    HOOK: "running the command of --on-done",
}


def time_left(progress: Progress) -> str:
    """The time left in words, with its range while that says something; "" if it is unknown."""
    left, least, most = progress.seconds_left, progress.least_left, progress.most_left
    if left is None or least is None or most is None:
        return ""
    said, low, high = f"about {clock(left)} left", clock(least), clock(most)
    if most < 1.2 * least or low == high:
        return said
    number, _, unit = low.partition(" ")
    same = high.count(" ") == 1 and high.endswith(f" {unit}")
    return f"{said} ({number if same else low} to {high})"


def clock(seconds: float) -> str:
    """A duration as it is told while it passes: in whole seconds, rounded when it is long."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds / 86400:.1f} days"
