"""The part of a job's specification that says how it runs; see `batchrun.jobs.options`."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import ClassVar

from batchrun.jobs import kinds
from batchrun.jobs.kinds import Integer, option

MOST_SEQUENCES = 1 << 20  # with more, the state kept for each would fill a machine's memory
_COUNT = Integer(1)


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
        "Device to compute on. auto: the first usable GPU, else the CPU.",
        kinds.DEVICE,
        "auto",
        section=kinds.MODEL,
    )
    devices: str | None = option(
        "Compute on several devices, one process each: all GPUs, the GPUs with these numbers, or "
        "N workers that share the CPU's cores. The limits below apply to each.",
        kinds.DEVICES,
        section=kinds.FLEET,
        anew=True,
        without="only --device",
    )
    ray: str | None = option(
        "Compute on a Ray cluster: this machine's (auto), or the one at ADDRESS. Workers are Ray "
        "actors; the job itself stays on this machine.",
        metavar="auto|ADDRESS",
        section=kinds.FLEET,
        anew=True,
    )
    workers: int | None = option(
        "With --ray: number of workers.",
        _COUNT,
        without="as many as the cluster's GPUs allow",
        section=kinds.FLEET,
        anew=True,
    )
    gpus_per_worker: float | None = option(
        "With --ray: GPUs per worker, with one engine each. A fraction shares a GPU; 0 computes on "
        "the CPU.",
        kinds.AT_LEAST_0,
        without="1 if the cluster has GPUs, else 0",
        section=kinds.FLEET,
        anew=True,
    )
    cpus_per_worker: int | None = option(
        "With --ray: CPU cores per worker.",
        _COUNT,
        without="1",
        section=kinds.FLEET,
        anew=True,
    )
    attention: str = option(
        "Attention kernel; `batchrun doctor` lists those that work on this machine.",
        default="auto",
        section=kinds.MODEL,
    )
    max_num_seqs: int | None = option(
        "Maximum number of sequences in a batch.",
        Integer(1, MOST_SEQUENCES),
        anew=True,
        without="256; 512 on a GPU with 40 GiB or more",
    )
    max_num_batched_tokens: int | None = option(
        "Maximum number of tokens per step; longer prompts are prefilled in chunks.",
        _COUNT,
        anew=True,
        without="1024 on a CPU, 8192 on a GPU, adjusted to measured step times",
    )
    kv_budget: int | None = option(
        "Maximum memory for the KV cache, such as 256MiB.",
        kinds.size(),
        anew=True,
        without="all free memory but 512 MiB",
    )
    page_size: int | None = option(
        "Size of a physical page of KV memory.",
        kinds.size(mmap.PAGESIZE),
        without="8 to 256 KiB on a CPU; about 32 tokens on a GPU",
    )
    layers_per_slab: int | None = option(
        "Layers whose keys and values lie side by side in a page.",
        _COUNT,
        without="all; on a CPU 1, if a token's layer is smaller than a page of the system",
    )
    share_prefixes: bool = option(
        "Prefix caching: compute and store common prefixes of prompts once.", default=True
    )
    drafts: bool = option(
        "Speculative decoding with draft tokens from the row's own text (prompt lookup) and other "
        "rows' answers.",
        default=True,
    )
    draft_model: str | None = option(
        "Speculative decoding with draft tokens from this smaller model, too. It needs the same "
        "tokenizer. Named like --model.",
        metavar="MODEL",
    )
    draft_path: str = ""
    draft_fingerprint: str = ""
    draft_tokens: int | None = option(
        "With --draft-model: maximum number of draft tokens per sequence and step. auto: as many "
        "as save time.",
        kinds.COUNT_OR_AUTO,
        without="auto",
    )
    overlap: bool = option("On a GPU: prepare the next step while one computes.", default=True)
    graphs: bool = option("On a GPU: record steps as CUDA graphs.", default=True)
    optimize: bool = option("Fuse the model's modules; on a GPU, compile them.", default=True)
    reorder: bool = option(
        "Reorder rows: those with a common prefix together, long ones first, and identical ones "
        "once (greedy decoding). The output keeps the input's order.",
        default=True,
    )
    deterministic: bool = option(
        "Batch-invariant answers: the same model, row, parameters and seed give the same answer in "
        "any batch, even if that is slower. The job fails at the start where that is impossible. "
        "Llama-like models are batch-invariant on a CPU anyway.",
        default=False,
    )
    keep_going: bool = option(
        "Go on even if the first 100 rows all fail the same way; by default, the job then ends.",
        default=False,
        anew=True,
    )
    on_done: str | None = option(
        "Run this shell command when the job has ended. BATCHRUN_STATE says how.",
        metavar="CMD",
        section=kinds.OUTPUT,
        anew=True,
    )
    param_columns: tuple[str, ...] = ()

    @property
    def has_fleet(self) -> bool:
        """Whether several processes compute."""
        return self.devices is not None or self.ray is not None
