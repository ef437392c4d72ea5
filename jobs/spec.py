"""A job's specification: everything that determines its output, and how it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from batchrun.jobs.about import AboutSpec
from batchrun.jobs.errors import InputError, JobError, SpecDamaged
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.kinds import PROMPT, SAMPLING, Integer, Option, option, options_of, whole
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.rows.store import INPUTS, Part, each
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.objectstore.paths import Location, StoreError, inside, location

VERSION = 1
FILE = "job.json"
_WHOLE = 64 << 20  # files up to this size are hashed whole
_SAMPLE = 1 << 20
_SAMPLES = 32
_SHOWN = 200  # characters of a value that differs

# These say where things are, how fast they run and what the job is called, not what comes out.
_NOT_CONTENT = {"output", "runtime", "version", "about"}
_PARTS: dict[str, type[Any]] = {
    "model": ModelSpec,
    "prompt": PromptSpec,
    "sampling": SamplingSpec,
    "output": OutputSpec,
    "runtime": RuntimeSpec,
    "about": AboutSpec,
}


@dataclass(frozen=True)
class InputFile:
    """One input.

    Args:
        path: Absolute path, or URL.
        size: In bytes.
        fingerprint: Digest of the content, so that a moved file is not a changed one.
        partition: Columns from the names of its folders; see `batchrun.jobs.rows.row.Part`.
    """

    path: str
    size: int
    fingerprint: str
    partition: Mapping[str, int | str | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Location,
        partition: Mapping[str, int | str | None] | None = None,
        most: int | None = None,
    ) -> InputFile:
        """Digest a file: all of it up to 64 MiB, beyond that 33 spread samples of 1 MiB.

        Args:
            path: Where it is.
            partition: Columns from the names of its folders.
            most: Read at most this many of its bytes.

        Raises:
            InputError: It can't be read.
        """
        try:
            size = INPUTS.stat(path).size
            size = size if most is None else min(size, most)
            digest = blake2b(str(size).encode(), digest_size=16)
            with INPUTS.open(path) as file:
                if size <= _WHOLE:
                    for begin in range(0, size, _SAMPLE):
                        digest.update(file.read(min(_SAMPLE, size - begin)))
                else:
                    for i in range(_SAMPLES + 1):
                        file.seek((size - _SAMPLE) * i // _SAMPLES)
                        digest.update(file.read(_SAMPLE))
        except StoreError as error:
            raise InputError(str(error), error.hint) from error
        except OSError as error:
            raise InputError(
                f"{path} can't be read: {error.strerror or error}",
                hint=f"if it is elsewhere now: batchrun resume --moved '{path}'=NEW"
                if isinstance(error, FileNotFoundError)
                else "check that the file is readable",
            ) from error
        return cls(str(path.absolute()), size, digest.hexdigest(), dict(partition or {}))


def input_files(parts: Sequence[Part]) -> tuple[InputFile, ...]:
    """See `InputFile.of`."""

    def of(number: int) -> InputFile:
        part = parts[number]
        return InputFile.of(part.path, part.partition, part.size)

    return tuple(each([part.path for part in parts], of))


@dataclass(frozen=True)
class JobSpec:
    """A job's specification. Immutable; written to the job's folder once.

    Args:
        inputs: The input files, in row order.
        input_format: `parquet`, `jsonl` or `csv`.
        prompt: How a row becomes a prompt.
        model: What computes the answers.
        sampling: How, where the user said so.
        seed: Of the whole job.
        n: Completions per row.
        keep: How many of them go to the output, the best by mean log-probability; None for all.
            With `--best-of`, `keep` is the value of `--n` and `n` that of `--best-of`.
        limit: Maximum number of rows; None for all.
        output: Where the answers go. Not part of the fingerprint.
        runtime: How to run. Not part of the fingerprint.
        about: What the job is called. Not part of the fingerprint.
    """

    SECTION: ClassVar = SAMPLING

    inputs: tuple[InputFile, ...]
    input_format: str
    prompt: PromptSpec
    model: ModelSpec
    sampling: SamplingSpec
    seed: int = whole(
        "Random seed; it makes sampling reproducible.", "of 64 bits", -1 << 63, default=0
    )
    n: int = option("Number of samples per row.", Integer(1), 1, metavar="N")
    limit: int | None = option(
        "Process only the first ROWS rows.",
        Integer(1),
        metavar="ROWS",
        section=PROMPT,
        without="all rows",
    )
    output: OutputSpec = field(default_factory=OutputSpec)
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    about: AboutSpec = field(default_factory=AboutSpec)
    version: int = VERSION
    keep: int | None = option(
        "Generate N samples per row and keep the --n with the highest mean log-probability.",
        Integer(1),
        name="best_of",
        without="--n",
    )

    @property
    def input_paths(self) -> list[Location]:
        """Where the inputs are."""
        return [location(file.path) for file in self.inputs]

    @property
    def parts(self) -> list[Part]:
        """The inputs for a source, each up to its size at submission."""
        return [Part(location(file.path), file.size, file.partition) for file in self.inputs]

    def fingerprint(self) -> str:
        """Digest of what determines the output; unchanged by moving inputs or model."""
        content = {k: v for k, v in asdict(self).items() if k not in _NOT_CONTENT}
        content["inputs"] = [
            [i.fingerprint, i.partition] if i.partition else i.fingerprint for i in self.inputs
        ]
        del content["model"]["path"], content["model"]["name"]
        text = json.dumps(content, sort_keys=True)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def paths(self) -> list[str]:
        """Where inputs and models are."""
        models = filter(None, (self.model.path, self.runtime.draft_path))
        return [*(i.path for i in self.inputs), *models]

    def at(self, places: Mapping[str, str]) -> JobSpec:
        """The same job with inputs, models and output moved to their new `places`.

        A moved output has the format of its new name, and replaces nothing there.

        Raises:
            OutputError: The output's new name implies no known format.
        """
        inputs = tuple(replace(i, path=places.get(i.path, i.path)) for i in self.inputs)
        model = replace(self.model, path=places.get(self.model.path, self.model.path))
        draft = self.runtime.draft_path
        runtime = replace(self.runtime, draft_path=places.get(draft, draft))
        output = self.output
        if (path := places.get(output.path)) is not None:
            from batchrun.jobs.rows.formats import output_format  # noqa: PLC0415 - seldom

            kind = output_format(location(path))
            output = replace(output, path=path, format=kind, overwrite=False, stdout=False)
        return replace(self, inputs=inputs, model=model, output=output, runtime=runtime)

    def within(self, folder: Path) -> JobSpec:
        """The same job, with full paths for files in its folder: the copies of stdin and stdout."""
        inputs = tuple(replace(f, path=str(inside(folder, f.path))) for f in self.inputs)
        path = self.output.path and str(inside(folder, self.output.path))
        return replace(self, inputs=inputs, output=replace(self.output, path=path))

    def save(self, folder: Path) -> None:
        """Write `job.json`."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> JobSpec:
        """Read `job.json`.

        Raises:
            SpecDamaged: It is missing, or not what was written.
            JobError: It has a newer version.
        """
        path = folder / FILE
        try:
            data = read_json(path)
            version = data["version"]
            if version > VERSION:
                raise JobError(
                    f"{path} has version {version}; this batchrun reads versions up to {VERSION}",
                    hint="pip install --upgrade batchrun-llm",
                )
            return cls.of(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecDamaged(
                f"{path} is not a job specification: {error}",
                hint="list the jobs: batchrun list",
            ) from error

    def edits(self, folder: Path) -> list[str] | None:
        """A line for each value that differs in `job.json`, whether or not its checksum is valid.

        None if the file is gone, or damaged beyond reading.
        """
        try:
            data = json.loads((folder / FILE).read_bytes())
            was, now = (dict(_flat(asdict(spec))) for spec in (self, JobSpec.of(data)))
            values = ((name, was.get(name, "null"), now.get(name, "null")) for name in was | now)
            return [f"{n}: {_short(a)}, now {_short(b)}" for n, a, b in values if a != b]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> JobSpec:
        """A specification from the output of `asdict`; ignores names unknown to this version."""
        found = _known_names(cls, data)
        for name in _PARTS.keys() & found:
            found[name] = _PARTS[name](**_known_names(_PARTS[name], found[name]))
        return cls(**{**found, "inputs": tuple(InputFile(**file) for file in data["inputs"])})


# Every option of a job, by its name in Python, in the order of the help text.
OPTIONS: Mapping[str, Option] = {
    found.name: found for part in (*_PARTS.values(), JobSpec) for found in options_of(part)
}
LIMIT_NAMES = tuple(name for name, found in OPTIONS.items() if found.anew)  # `resume` sets these


def _known_names(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of that class in a JSON object, with JSON's lists as tuples again."""
    names = {f.name for f in fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in {**data}.items()
        if name in names
    }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings, as JSON, with their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
