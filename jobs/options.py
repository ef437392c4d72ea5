"""The parts of a job's specification: each field declares its option, with default and help.

A default means that the user did not set the option.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from batchrun.jobs import kinds, shapes
from batchrun.jobs.kinds import NUMBER, Choice, Integer, RowRule, number, one_of, option, whole

MOST_SEQUENCES = 1 << 20  # with more, the state kept for each would fill a machine's memory
_COUNT = Integer(1)


@dataclass(frozen=True)
class ModelSpec:
    """Which model computes the answers.

    Args:
        name: What the user called it.
        path: Its folder.
        fingerprint: Digest of its content.
    """

    SECTION: ClassVar = kinds.MODEL

    name: str = option(
        "Alias, folder, .gguf file, the URL of either in an object store, or hub id.",
        name="model",
        short="-m",
        default="smollm2-135m-instruct",
    )
    path: str = ""
    fingerprint: str = ""
    dtype: str = option(
        "Type of weights and KV cache. auto: the model's own on a GPU; on a CPU bfloat16 if it "
        "has instructions for that, else float32.",
        one_of("auto", "float32", "bfloat16", "float16"),
        "auto",
    )
    quantize: str | None = option(
        "8-bit weights: half the memory; answers differ slightly from the full model's.",
        one_of("int8"),
    )
    max_model_len: int | None = option(
        "Maximum tokens of prompt and completion together; default: the model's context length.",
        _COUNT,
        metavar="TOKENS",
    )
    trust_remote_code: bool = option(
        "Run Python code that comes with the model. Read it first.", default=False
    )


@dataclass(frozen=True)
class PromptSpec:
    """How a row becomes a prompt. `column` is None if a template makes it."""

    SECTION: ClassVar = kinds.PROMPT

    column: str | None = option(
        "Column to read; default: prompt, else messages or conversations.",
        name="prompt_column",
        metavar="NAME",
    )
    template: str | None = option(
        "Build the prompt from columns: 'Summarise: {text}'. Braces can hold any column's name; "
        "{{ and }} are literal braces.",
        metavar="TEXT",
    )
    chat: bool = option(
        "Send the prompt as a user message through the chat template.", default=False
    )
    system: str | None = option("System message before the prompt; implies --chat.", metavar="TEXT")
    template_args: Mapping[str, Any] = option(
        "Pass a variable to the model's chat template, such as enable_thinking=false. A row's "
        "column chat_template_kwargs overrides it. Repeatable.",
        kinds.NAMED,
        {},
        flag="--template-arg",
    )
    special_tokens_in_data: bool = option(
        "Treat text that reads like a control token (<|im_end|>, </s>) as one in the columns of a "
        "chat or a --template; by default it stays text. In a plain prompt it always is one.",
        default=False,
    )
    skip_empty: bool = option(
        "Skip rows without a prompt: they get no completion, and are not errors.",
        default=False,
    )
    ignore_param_columns: bool = option(
        "Treat columns named like a sampling parameter (temperature, seed, stop, ...), tools or "
        "chat_template_kwargs as data.",
        default=False,
    )


@dataclass(frozen=True)
class SamplingSpec:
    """Sampling parameters as the user gave them; the rest default to the model's, or batchrun's.

    Their meaning is that of `batchrun.engine.core.SamplingParams`.
    """

    SECTION: ClassVar = kinds.SAMPLING

    max_tokens: int | None = whole(
        "Maximum new tokens. With scores the default is 0.", "at least 1, or 0 with scores"
    )
    min_tokens: int | None = whole("Do not stop before this many tokens.", "0 or more")
    temperature: float | None = number(
        "Randomness; 0 always takes the likeliest token.",
        "0 or more, and at most 5",
        lambda v: 0 <= v <= 5,
    )
    top_p: float | None = number(
        "Sample from the likeliest tokens that add up to X.",
        "above 0 and at most 1",
        lambda v: 0 < v <= 1,
    )
    top_k: int | None = whole(
        "Sample from the N likeliest tokens; 0 is off.", "0 (off) or more", 0, 1 << 31
    )
    min_p: float | None = number(
        "Drop tokens less likely than X times the likeliest.",
        "between 0 and 1",
        lambda v: 0 <= v <= 1,
    )
    repetition_penalty: float | None = number(
        "Values above 1 discourage repetition.",
        "above 0 (0.000001 to 1000000)",
        lambda v: 1e-6 < v < 1e6,
    )
    presence_penalty: float | None = number(
        "Subtracted once from the logit of a token already in the answer."
    )
    frequency_penalty: float | None = number(
        "Subtracted for each time that the answer has the token."
    )
    stop: tuple[str, ...] = option(
        "Stop before this text. Repeatable.",
        default=(),
        several=True,
        metavar="TEXT",
        row=RowRule("text, or a list of texts"),
    )
    stop_token_ids: tuple[int, ...] = option(
        "Stop at this token. Repeatable.",
        Integer(0),
        (),
        several=True,
        flag="--stop-token-id",
        metavar="ID",
        row=RowRule(
            "a list of whole numbers, 0 or more", lambda ids: all(0 <= i < 1 << 31 for i in ids)
        ),
    )
    ignore_eos: bool = option(
        "Never choose the model's end tokens.", default=False, row=RowRule("true or false")
    )
    logprobs: int | None = option(
        "Add each token's log-probability, and those of the N likeliest tokens in its place.",
        Integer(0),
    )
    num_beams: int | None = option(
        "Search for the likeliest answer with N beams instead of sampling.", _COUNT
    )
    length_penalty: float | None = option(
        "Beam search: above 1 favours long answers, below 1 short ones; default: 1.", NUMBER
    )
    early_stopping: bool | Literal["never"] | None = option(
        "Beam search: yes ends once N answers are complete; no (the default) once no better one "
        "is likely; never only once none is possible.",
        Choice({"no": False, "yes": True, "never": "never"}),
    )
    json_schema: str | None = option(
        "The answer is JSON of this schema. Adds the column parsed, with the schema's types.",
        shapes.SCHEMA,
        section=kinds.SHAPE,
        row=RowRule("a JSON schema: an object"),
    )
    json_object: bool = option("The answer is any JSON object.", default=False, section=kinds.SHAPE)
    regex: str | None = option(
        "The answer matches this regular expression as a whole (Rust's syntax).",
        shapes.REGEX,
        section=kinds.SHAPE,
        row=RowRule("a regular expression"),
    )
    choices: tuple[str, ...] | None = option(
        "The answer is one of these: texts separated by commas, or a JSON array. Adds the column "
        "parsed, with the choices as categories.",
        shapes.CHOICES,
        section=kinds.SHAPE,
        row=RowRule("a list of texts"),
    )
    choice_logprob: bool = option(
        "With --choices: add the column choice_logprob, the choice's log-probability in the "
        "model's own distribution.",
        default=False,
        section=kinds.SHAPE,
    )
    grammar: str | None = option(
        "The answer is a sentence of this grammar (Lark's notation, as llguidance reads it).",
        shapes.GRAMMAR,
        section=kinds.SHAPE,
    )
    score: str | None = option(
        "Log-probabilities of this column's text behind the prompt: adds score_logprobs, "
        "score_sum, score_mean and score_tokens.",
        section=kinds.SCORES,
        metavar="COLUMN",
    )
    labels: tuple[str, ...] | None = option(
        "Probabilities of these texts behind the prompt, each by its first token: texts separated "
        "by commas, or a JSON array. Adds label_probs, in the model's own distribution: they need "
        "not add up to 1.",
        shapes.CHOICES,
        section=kinds.SCORES,
    )
    perplexity: bool = option(
        "Add perplexity: that of the text of --score, or else of the prompt, whose first token is "
        "left out.",
        default=False,
        section=kinds.SCORES,
    )

    @property
    def scores(self) -> bool:
        """Whether known text is scored."""
        return bool(self.score is not None or self.labels or self.perplexity)

    @property
    def given(self) -> dict[str, Any]:
        """The sampling parameters that the user gave, by name; with scores, also their defaults.

        With scores nothing is generated, unless that is asked for by a length or a shape.
        """
        said = [f for f in fields(self) if getattr(self, f.name) != f.default]
        sections = {f.name: f.metadata["option"].section for f in said}
        columns = [n for n, section in sections.items() if section == kinds.SCORES]
        found = {f.name: getattr(self, f.name) for f in said if f.name not in columns}
        found.pop("choice_logprob", None)  # it only adds a column
        if self.scores:
            found["scoring"] = True
            if kinds.SHAPE not in sections.values():
                found.setdefault("max_tokens", 0)
        return found


@dataclass(frozen=True)
class OutputSpec:
    """Where the answers go.

    Args:
        format: `parquet`, `jsonl` or `csv`.
        stdout: The file is in the job's folder, and is copied to stdout at the end.
    """

    SECTION: ClassVar = kinds.OUTPUT

    path: str = option(
        "A .parquet, .jsonl, .csv or .tsv file, or - for stdout; default: "
        "INPUT-completions, in the input's format, in this folder.",
        default="",
        name="output",
        short="-o",
        metavar="FILE",
    )
    format: str = ""
    prefix: str = option(
        "Prefix for the names of added columns: judge_ gives judge_completion, and so on.",
        default="",
        name="output_prefix",
        metavar="TEXT",
    )
    overwrite: bool = option("Replace the output file if it exists.", default=False)
    token_ids: bool = option("Add the column completion_token_ids.", default=False)
    stdout: bool = False


@dataclass(frozen=True)
class RuntimeSpec:
    """How a job runs, which never changes an answer. None leaves the choice to the device.

    Args:
        draft_path: The draft model's folder.
        draft_fingerprint: Digest of its content.
        param_columns: Columns with rows' own parameters, as announced at submission.
    """

    SECTION: ClassVar = kinds.RUNNING

    device: str = option(
        "Where to compute. auto: the first usable GPU, else the CPU.",
        kinds.DEVICE,
        "auto",
        section=kinds.MODEL,
    )
    devices: str | None = option(
        "Compute on several devices at once, with a process for each: all GPUs, those with these "
        "numbers, or N workers that share the CPU's cores. Limits below are those of each.",
        kinds.DEVICES,
        section=kinds.FLEET,
        anew=True,
    )
    ray: str | None = option(
        "Compute on the machines of a Ray cluster: that of this machine (auto), or the one at an "
        "address. This process keeps the job; its workers are Ray's actors.",
        metavar="auto|ADDRESS",
        section=kinds.FLEET,
        anew=True,
    )
    workers: int | None = option(
        "With --ray: number of workers; default: as many as the cluster's GPUs allow.",
        _COUNT,
        section=kinds.FLEET,
        anew=True,
    )
    gpus_per_worker: float | None = option(
        "With --ray: GPUs of each worker, with an engine for each; a part of one to share it, 0 "
        "for the CPU; default: 1 where the cluster has GPUs.",
        kinds.AT_LEAST_0,
        section=kinds.FLEET,
        anew=True,
    )
    cpus_per_worker: int | None = option(
        "With --ray: CPU cores of each worker; default: 1.",
        _COUNT,
        section=kinds.FLEET,
        anew=True,
    )
    attention: str = option(
        "Attention kernel; `batchrun doctor` lists those that work here.",
        default="auto",
        section=kinds.MODEL,
    )
    max_num_seqs: int | None = option(
        "Maximum rows that generate at the same time.", Integer(1, MOST_SEQUENCES), anew=True
    )
    max_num_batched_tokens: int | None = option(
        "Maximum tokens per step; longer prompts are split into chunks.",
        _COUNT,
        anew=True,
    )
    kv_budget: int | None = option(
        "Maximum memory of the KV cache, such as 256MiB.", kinds.size(), anew=True
    )
    page_size: int | None = option(
        "Size of a physical page of KV memory.", kinds.size(mmap.PAGESIZE)
    )
    layers_per_slab: int | None = option("Layers that share a KV slab; default: all.", _COUNT)
    share_prefixes: bool = option(
        "Compute and store the common beginnings of prompts once.", default=True
    )
    drafts: bool = option(
        "Draft tokens from the row's own text and other rows' answers, and verify many in a step.",
        default=True,
    )
    draft_model: str | None = option(
        "Draft tokens from this smaller model too, which must have the same tokenizer: alias, "
        "folder, .gguf file, URL or hub id.",
        metavar="MODEL",
    )
    draft_path: str = ""
    draft_fingerprint: str = ""
    draft_tokens: int | None = option(
        "Draft tokens of the draft model per row and step, at most; default: auto, as many as pay.",
        kinds.COUNT_OR_AUTO,
    )
    overlap: bool = option("On a GPU: plan, map and copy while it computes.", default=True)
    graphs: bool = option("On a GPU: record steps as CUDA graphs.", default=True)
    optimize: bool = option("Fuse the model's modules, and on a GPU compile them.", default=True)
    reorder: bool = option(
        "Compute identical rows once, rows that begin alike together, and long ones early.",
        default=True,
    )
    deterministic: bool = option(
        "Have every answer depend on the model, the row, the parameters and the seed alone, never "
        "on the batch, even where that is slower; fail at the start where it can't be. On a CPU, "
        "Llama-like models are so anyway.",
        default=False,
    )
    keep_going: bool = option(
        "Go on even if the first 100 rows all fail the same way, which otherwise ends the job.",
        default=False,
        anew=True,
    )
    param_columns: tuple[str, ...] = ()

    @property
    def has_fleet(self) -> bool:
        """Whether several processes compute."""
        return self.devices is not None or self.ray is not None
