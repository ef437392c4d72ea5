"""Whether a job's inputs and model are still those it was submitted with, wherever they are.

A moved file is not a changed one: `places.json` says where the paths of the immutable `job.json`
lead now. Nor does less memory make it another job: `limits.json` says how it runs now.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from batchrun.jobs.errors import (
    InputError,
    JobError,
    OptionError,
    SpecChanged,
    SpecDamaged,
    refused,
)
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.rows.store import INPUTS, Part
from batchrun.jobs.spec import FILE, LIMIT_NAMES, OPTIONS, JobSpec, input_files
from batchrun.objectstore.paths import Location, location, moved

if TYPE_CHECKING:
    from batchrun.jobs.folder import JobFolder

ModelFingerprint = Callable[[Path], str]

PLACES = "places.json"
LIMITS = "limits.json"


def load_places(folder: Path) -> dict[str, str]:
    """The new places of the job's files that have moved, by old path.

    Raises:
        JobError: The file is damaged.
    """
    return {old: str(new) for old, new in _told(folder / PLACES, "--moved OLD=NEW").items()}


def load_limits(folder: Path) -> dict[str, Any]:
    """The limits that `batchrun resume` has changed since submission, by `RuntimeSpec` field.

    Raises:
        JobError: The file is damaged.
    """
    told = _told(folder / LIMITS, "--max-num-seqs N")
    found = {}
    for name in LIMIT_NAMES:
        with suppress(OptionError):
            if name in told:
                found[name] = OPTIONS[name].read(told[name])
    return found


def set_limits(folder: Path, limits: Mapping[str, Any]) -> None:
    """Note new limits for the job, None for the default; earlier ones that are not given stay.

    Raises:
        JobError: The file with the earlier ones is damaged.
        OSError: It can't be written.
    """
    write_json(folder / LIMITS, {**load_limits(folder), **limits})


def _told(path: Path, again: str) -> dict[str, Any]:
    """The content of a file that `batchrun resume` wrote; empty if there is none."""
    try:
        return {str(name): value for name, value in read_json(path).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise JobError(
            f"{path} can't be read: {error}",
            hint=f"remove it, then give the option again: batchrun resume {again}",
        ) from error


def places_with_output(folder: Path, spec: JobSpec, output: Location | None) -> dict[str, str]:
    """What `load_places` returns, with the output's new place unless that is None.

    Args:
        folder: The job's.
        spec: As submitted.
        output: Where the output goes now.

    Raises:
        JobError: The file is damaged.
    """
    places = load_places(folder)
    if output is not None:
        places[spec.output.path] = str(output)
    return {old: new for old, new in places.items() if old != new}


def check_unchanged(job: JobFolder, model_fingerprint: ModelFingerprint | None = None) -> None:
    """Refuse to continue with anything but what was submitted.

    Args:
        job: The job.
        model_fingerprint: Digests a model; without it the model is not checked.

    Raises:
        SpecChanged: The message names what changed.
        SpecDamaged: `job.json` can't be read.
        InputError: An input or the model is gone or can't be read.
        JobError: It trusts its model's code, and somebody else could have written that.
    """
    spec = job.spec()
    if spec.model.trust_remote_code and (why := job.foreign()) is not None:
        raise JobError(
            f"the job lets a model's code run, but may be another user's: {why}",
            hint=f"check `batchrun show {job.id}`; if you trust it, make its folder yours, and "
            "writable by you alone",
        )
    with job.journal() as journal:
        kept = journal.meta("spec")
    edited = JobSpec.of(kept).edits(job.path) if kept is not None else []
    if edited is None:
        raise SpecDamaged(
            f"{job.path / FILE} is damaged; the journal has its content",
            hint=f"batchrun resume {job.id} rewrites it",
        )
    if edited:
        raise SpecChanged(
            "job.json was edited since the job was submitted, or is damaged: " + "; ".join(edited),
            hint="undo that, or remove the file: `batchrun resume` rewrites it; "
            "new parameters need a new job",
        )
    changed = changes(spec, model_fingerprint)
    if changed:
        raise SpecChanged(
            "the input or model changed since the job was submitted: " + "; ".join(changed),
            hint="restore it, or submit the new one as a new job",
        )


def move(
    job: JobFolder, old: str, new: str, model_fingerprint: ModelFingerprint | None = None
) -> None:
    """Note that a file or folder has moved, if its content is the same.

    Args:
        job: The job.
        old: Where it was: at submission, or after an earlier move.
        new: Where it is.
        model_fingerprint: Digests a model; without it a moved model is not checked.

    Raises:
        SpecChanged: What is there is not what was submitted.
        JobError: The job has nothing in `old`, or `new` can't be read.
    """
    spec, places = job.submitted(), load_places(job.path)
    # What Linux calls /data is never a path of Windows: it is compared as text.
    before = PurePosixPath(old) if old.startswith("/") else location(old).absolute()
    after = location(new).absolute()
    found = {
        path: now
        for path in spec.paths()
        for known in (places.get(path, path), path)
        if (now := moved(known, before, after)) is not None
    }
    if not found:
        there = [places.get(path, path) for path in spec.paths()]
        raise JobError(
            f"the job {job.id} has neither an input nor its model in {before}",
            hint=f"it has {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}",
        )
    changed = changes(spec.at(found), model_fingerprint, only=set(found.values()))
    if changed:
        raise SpecChanged(
            f"{after} is not what the job was submitted with: {'; '.join(changed)}",
            hint="find the old one, or submit the new one as a new job",
        )
    write_json(job.path / PLACES, places | found)


def grown(spec: JobSpec) -> list[str]:
    """A line for each text input that has grown since submission; the rest is not in the job."""
    lines = []
    for was in spec.inputs if _may_grow(spec) else ():
        with suppress(OSError):
            more = INPUTS.stat(location(was.path)).size - was.size
            if more > 0:
                lines.append(
                    f"{was.path} has grown by {more:,} bytes since the job was submitted: "
                    "they are not part of it"
                )
    return lines


def changes(
    spec: JobSpec,
    model_fingerprint: ModelFingerprint | None = None,
    only: Container[str] | None = None,
) -> list[str]:
    """A line for each input, and for the model, whose content changed since submission.

    A text file that has only grown counts as unchanged.

    Args:
        spec: The job, with current paths.
        model_fingerprint: Digests a model; without it the model is not checked.
        only: The paths to check; default: all.

    Raises:
        InputError: One is gone or can't be read.
    """
    lines = []
    inputs = [file for file in spec.inputs if only is None or file.path in only]
    # Appended text is not part of the job: text sources stop at the submitted size.
    grows = _may_grow(spec)
    parts = [Part(location(file.path), file.size if grows else None) for file in inputs]
    for was, now in zip(inputs, input_files(parts), strict=True):
        if was.size != now.size:
            lines.append(f"{was.path}: it had {was.size} bytes, and now has {now.size}")
        elif was.fingerprint != now.fingerprint:
            lines.append(f"{was.path}: its content changed")
    model = spec.model.path
    if model and model_fingerprint is not None and (only is None or model in only):
        elsewhere = f"if it is elsewhere now: batchrun resume --moved '{model}'=NEW"
        with refused(InputError, f"the model in {model} can't be read", elsewhere):
            os.stat(model)
            if model_fingerprint(Path(model)) != spec.model.fingerprint:
                lines.append(f"the model in {model}: its weights, config or tokenizer changed")
    return lines


def _may_grow(spec: JobSpec) -> bool:
    from batchrun.jobs.rows.formats import FORMATS  # noqa: PLC0415 - Arrow, seldom

    return not FORMATS[spec.input_format].columnar
