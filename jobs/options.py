"""What a user says of a job, part by part. A default stands for what was not said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class PromptSpec:
    """How a row becomes a prompt.

    Args:
        column: The column that holds it; None with a template.
        template: Text with `{column}` fields.
        chat: The prompt is a user's message in the model's chat template.
        system: A system message before it; implies `chat`.
        template_args: What the chat template is told, by name.
        special_tokens_in_data: What reads like a control token in a row is one.
        skip_empty: Rows without a prompt are no errors.
        ignore_param_columns: Columns named like parameters are data.
    """

    column: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_data: bool = False
    skip_empty: bool = False
    ignore_param_columns: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Which model computes the answers.

    Args:
        name: What the user called it.
        path: Its folder.
        fingerprint: Of its content.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantize: `int8`, or None.
        trust_remote_code: Its own Python code may run.
        max_model_len: Tokens of prompt and completion at most; None for the model's own.
    """

    name: str = ""
    path: str = ""
    fingerprint: str = ""
    dtype: str = "auto"
    quantize: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = None


@dataclass(frozen=True)
class SamplingSpec:
    """Sampling parameters as the user gave them; the rest is the model's, or batchrun's, default.

    Their meaning is that of `batchrun.engine.core.SamplingParams`.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What the user gave, by name."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in values if value != default}


@dataclass(frozen=True)
class OutputSpec:
    """Where the answers go.

    Args:
        path: The file.
        format: `parquet`, `jsonl` or `csv`.
        token_ids: It has a column `completion_token_ids`.
        prefix: Put before the names of added columns.
        overwrite: What is at `path` may be replaced.
        stdout: It lies in the job's folder, and is handed out in the end.
    """

    path: str = ""
    format: str = ""
    token_ids: bool = False
    prefix: str = ""
    overwrite: bool = False
    stdout: bool = False


@dataclass(frozen=True)
class RuntimeSpec:
    """How a job runs, which never changes an answer. None leaves it to the device.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        attention: Name of the kernel, or `auto`.
        max_num_seqs: Rows that generate at the same time at most.
        max_num_batched_tokens: Tokens of a step at most.
        kv_budget: Bytes of KV memory at most.
        page_size: Bytes of one of its pages.
        layers_per_slab: Layers whose keys and values lie together.
        share_prefixes: What rows begin with in common is computed and held once.
        drafts: On a CPU tokens are guessed.
        overlap: On a GPU the next step is planned while one is computed.
        graphs: On a GPU steps are recorded.
        optimize: The model's modules are fused.
        plan: Rows are put in order, and equal ones computed once.
        param_columns: Columns that say a row's own parameters, as told when it was submitted.
    """

    device: str = "auto"
    attention: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_budget: int | None = None
    page_size: int | None = None
    layers_per_slab: int | None = None
    share_prefixes: bool = True
    drafts: bool = True
    overlap: bool = True
    graphs: bool = True
    optimize: bool = True
    plan: bool = True
    param_columns: tuple[str, ...] = ()
