"""From the options of `submit` to a checked `JobSpec`: what is bound to fail, fails here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from batchrun.engine.core import SamplingParams
from batchrun.engine.text import template_fields
from batchrun.models import resolve
from jobs.errors import InputError
from jobs.export import check_columns, check_destination
from jobs.source import expand_inputs, open_source
from jobs.spec import InputFile, JobSpec

_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_RUNTIME = (
    "device",
    "attention",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_budget",
    "page_size",
    "layers_per_slab",
)
_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def make_spec(
    inputs: Sequence[str],
    home: Path,
    options: Mapping[str, Any],
    *,
    log: Callable[[str], None],
) -> JobSpec:
    """Checks every option against the inputs, the destination and the model.

    Converts or downloads the model if that has not been done yet, which `log` is told.

    Raises:
        click.UsageError: An option has a value that it cannot have.
        JobError: An input cannot be read, a column is missing, the output cannot be written.
        ModelError: The model cannot be used.
    """
    sampling = sampling_settings(options)
    fields = _template_fields(options)
    paths = expand_inputs(inputs)
    output = output_settings(options["output"] or _default_output(paths[0]))
    output |= {name: options[name] for name in ("token_ids", "overwrite")}
    source = open_source(paths)
    spec = JobSpec(
        inputs=tuple(InputFile.of(path) for path in paths),
        input_format=source.format,
        prompt=_prompt(options, fields, source.schema),
        model={},
        sampling=sampling,
        seed=options["seed"],
        n=options["n"],
        limit=options["limit"],
        output=output,
        runtime={name: options[name] for name in _RUNTIME},
    )
    check_columns(source.schema, spec)
    check_destination(Path(output["path"]), overwrite=options["overwrite"])
    return replace(spec, model=_model(options, home, log))


def sampling_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that were given; what was not is the model's or batchrun's default.

    Raises:
        click.UsageError: A value is out of range.
    """
    given = {name: options[name] for name in _SAMPLING if options[name] is not None}
    given |= {name: list(options[name]) for name in ("stop", "stop_token_ids") if options[name]}
    if options["ignore_eos"]:
        given["ignore_eos"] = True
    if "" in options["stop"]:
        raise click.UsageError("--stop must not be empty")
    try:
        SamplingParams(**{**given, "stop": tuple(options["stop"])})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise click.UsageError(f"--{name.replace('_', '-')} {rest}") from error
    return given


def output_settings(path: str) -> dict[str, Any]:
    """Where the output goes and in which format, which the name's suffix says.

    Raises:
        click.UsageError: The suffix says nothing.
    """
    destination = Path(path).expanduser().absolute()
    file_format = _FORMATS.get(destination.suffix.lower())
    if file_format is None:
        raise click.UsageError(
            f"--output {path} must end in {', '.join(_FORMATS)}, which says the format"
        )
    return {"path": str(destination), "format": file_format}


def _default_output(first: Path) -> str:
    stem = first.name.split(".")[0] or first.parent.name
    suffix = ".parquet" if ".parquet" in first.suffixes else ".jsonl"
    return f"{stem}-completions{suffix}"


def _template_fields(options: Mapping[str, Any]) -> list[str] | None:
    template = options["template"]
    if template is None:
        return None
    if options["prompt_column"] is not None:
        raise click.UsageError("--template and --prompt-column exclude each other")
    try:
        return template_fields(template)
    except ValueError as error:
        raise click.UsageError(f"--template: {error}") from error


def _prompt(
    options: Mapping[str, Any], fields: Sequence[str] | None, schema: pa.Schema
) -> dict[str, Any]:
    """How a row becomes a prompt. A `messages` column is used where there is no `prompt`."""
    column = options["prompt_column"]
    if fields is not None:
        for name in fields:
            _check_column(name, schema, in_template=True)
    else:
        if column is None:
            alone = "messages" in schema.names and "prompt" not in schema.names
            column = "messages" if alone else "prompt"
        _check_column(column, schema, in_template=False)
        _check_type(schema.field(column))
    return {
        "column": column,
        "template": options["template"],
        "chat": options["chat"] or options["system"] is not None,
        "system": options["system"],
    }


def _check_column(name: str, schema: pa.Schema, *, in_template: bool) -> None:
    if name in schema.names:
        return
    near = next(iter(get_close_matches(name, schema.names, n=1)), None)
    if in_template:
        hint = f"write {{{near}}} for the column {near!r}" if near else "use one of those columns"
    else:
        hint = f"say which one holds the prompts: --prompt-column {near or schema.names[0]}"
    raise InputError(
        f"there is no column {name!r}; the input has {', '.join(schema.names)}", hint=hint
    )


def _check_type(field: pa.Field[Any]) -> None:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    accepted = ("is_string", "is_large_string", "is_string_view", "is_list", "is_large_list")
    if any(getattr(pa.types, name)(kind) for name in (*accepted, "is_null")):
        return
    raise InputError(
        f"the column {field.name!r} holds {field.type}, not text or a list of messages",
        hint=f"make text of it: --template '{{{field.name}}}'",
    )


def _model(options: Mapping[str, Any], home: Path, log: Callable[[str], None]) -> dict[str, Any]:
    trusted = options["trust_remote_code"]
    ref = resolve(options["model"], home / "models", trust_remote_code=trusted, log=log)
    return {
        "name": ref.name,
        "path": str(ref.path),
        "fingerprint": ref.fingerprint,
        "dtype": options["dtype"],
        "trust_remote_code": trusted,
    }
