"""What a user calls a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from batchrun.jobs.kinds import LABEL, NAMES, option


@dataclass(frozen=True)
class AboutSpec:
    """What the user calls the job. Two jobs that differ in nothing else are the same work."""

    SECTION: ClassVar = NAMES

    name: str | None = option(
        "Begin the job's id with this, instead of the input's name.", LABEL, metavar="NAME"
    )
    tags: tuple[str, ...] = option(
        "Tag for `show` and `list --tag`: a word or KEY=VALUE. Can be repeated. Not related to "
        "--labels, the texts to score.",
        LABEL,
        (),
        name="tag",
        several=True,
        metavar="TEXT",
    )
