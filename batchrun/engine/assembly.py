"""An engine for one device: memory, kernels, executor and scheduler put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import log2
from mmap import PAGESIZE
from pathlib import Path

import torch

from batchrun import machine
from batchrun.allocator.accounting import Usage, UsageIntegral, paged_bytes, static_bytes
from batchrun.allocator.arena import KVArena
from batchrun.allocator.cuda import CudaMemory, Driver
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV, planes_of
from batchrun.allocator.tensor import layer_views, slab_bytes
from batchrun.allocator.vmm import AllocatorError, VirtualMemory
from batchrun.engine import attention, cpu
from batchrun.engine.attention import Geometry
from batchrun.engine.core import EngineError, Request, SamplingParams, Segment, StepPlan
from batchrun.engine.core import Sequence as Row
from batchrun.engine.cpu import Level
from batchrun.engine.drafts import Drafts
from batchrun.engine.engine import Engine
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.graphs import CudaRecorder, batch_sizes
from batchrun.engine.model.generation import read_generation
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.pieces import CudaPieces
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.sharing import KEPT
from batchrun.engine.transfers import CudaTransfers, HostTransfers, Transfers
from batchrun.errors import ModelError

_HOST_PAGE = 256 << 10  # bytes, of all slabs of a slot together
_LEAST_HOST_PAGE = 8 << 10  # bytes: mapping smaller ones takes longer than filling them
# The driver takes as long to map an allocation of 128 MiB as one of 2 MiB (docs/memory.md).
_DEVICE_PAGE_TOKENS = 32
_LEAST_DEVICE_PAGE = 2 << 20  # bytes
_MOST_ADDRESSES = 1 << 46  # bytes of slots, of which a process can have less than twice as many
_LOOKAHEAD = 4  # steps
_GIVE_BACK = 16  # pages a step: some 45 us each in the driver, and a short step takes 2 ms
_DEVICE_SLACK, _HOST_SLACK = 0.02, 0.05  # unused pages to keep, as a part of the claimed ones
_HOST_HEADROOM = 512 << 20  # bytes of memory that the KV cache leaves to everybody else
DEVICE_HEADROOM = 512 << 20  # the same on a GPU, where others are other processes
# A step is recorded up to so many times the tokens for which the device takes as long as launching
# them takes the host, which has more to do than that.
_RECORDED = 1.5
_DRAFT_LOGITS = 96 << 20  # bytes of a step's logits: more than that no guess is worth
_STEP_SHARE = 0.1  # of a step's time, what it costs beside its tokens


@dataclass(frozen=True)
class Settings:
    """How to run a model: nothing here changes what comes out.

    Args:
        model_path: Folder with config, tokenizer and safetensors.
        model_name: What to call it in messages.
        fingerprint: Of the model's content, for remembered verdicts.
        cache: Folder of remembered verdicts.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantize: `int8` for weights of 8 bits, or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        attention: Name of the attention backend.
        max_num_seqs: Sequences that run at once; None for the device's default, as below.
        max_num_batched_tokens: Tokens computed in one step at most; None for the device's default,
            or what `step_cost` makes of it.
        step_cost: What a step takes beside its tokens, in the time of one token, as measured in
            earlier runs; None where there were none.
        max_model_len: Context length; None for the model's own.
        kv_budget: Bytes of KV pages at most; None for what the device has.
        page_size: Bytes of a KV page; None for 8 to 256 KiB on a CPU, the more the fewer slabs,
            and on a GPU for some 32 tokens, but the driver's least at least.
        layers_per_slab: Layers whose keys and values lie together; None for all on a GPU, and on a
            CPU for one where a layer's share of a token is less than what a TLB entry covers.
        share_prefixes: Whether rows with a common prefix compute and hold it once.
        drafts: Whether tokens are guessed; only on a CPU, in bfloat16.
        overlap: Whether the host works on the next step while the device computes one.
        graphs: Whether steps are recorded as CUDA graphs, those with prompts in pieces.
        optimize: Whether the model's modules are fused, and compiled on a GPU.
        trust_remote_code: Whether the model's own Python code may run.
    """

    model_path: str
    model_name: str
    fingerprint: str
    cache: Path
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"
    attention: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    step_cost: float | None = None
    max_model_len: int | None = None
    kv_budget: int | None = None
    page_size: int | None = None
    layers_per_slab: int | None = None
    share_prefixes: bool = True
    drafts: bool = True
    overlap: bool = True
    graphs: bool = True
    optimize: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Limits:
    """What a step is made of, where the user did not say."""

    max_num_seqs: int
    max_num_batched_tokens: int

    def step_tokens(self, step_cost: float | None) -> int:
        """Tokens of a step: so many that what it costs beside them is a tenth of its time.

        A quarter to twice the default, and the default where the cost is not known.
        """
        if not step_cost:
            return self.max_num_batched_tokens
        wanted = 1 << max(0, round(log2(step_cost / _STEP_SHARE)))
        least = max(self.max_num_seqs, self.max_num_batched_tokens // 4)
        return max(least, min(wanted, 2 * self.max_num_batched_tokens))


LIMITS = {"cpu": Limits(256, 1024), "cuda": Limits(256, 8192)}


def choose_device(name: str, log: Callable[[str], None] = lambda _: None) -> str:
    """The torch device that `--device` means.

    Raises:
        ModelError: There is no such device here; the message says what is missing.
    """
    if name == "cpu":
        return "cpu"
    problem = _why_no_cuda(name)
    if problem is None:
        return "cuda:0" if name in {"auto", "cuda"} else name
    if name != "auto":
        raise ModelError(f"the device {name} can't be used: {problem}", hint="use --device cpu")
    if torch.cuda.is_available():
        log(f"computing on the CPU, because the GPU can't be used: {problem}")
    return "cpu"


def _why_no_cuda(name: str) -> str | None:
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA"
        )
    if name not in {"auto", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}:
        return f"there are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
    try:
        Driver()
    except AllocatorError as error:
        return str(error)
    return None


class Assembly:
    """A model's engine. Close it to give the memory back.

    Args:
        loaded: The model, on its device.
        settings: How to run it.
        log: Told, a line each, what the user should know.

    Attributes:
        kernels: What computes: the attention backend, and what `optimize` made faster.
        generation: How the model wants to be sampled.

    Raises:
        EngineError: There is no memory for it, or a backend asked for by name can't be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        limits = LIMITS[loaded.device.type]
        self.loaded = loaded
        self.settings = settings
        self.max_num_seqs = settings.max_num_seqs or limits.max_num_seqs
        self.max_num_batched_tokens = settings.max_num_batched_tokens or limits.step_tokens(
            settings.step_cost
        )
        self.generation = read_generation(loaded.model, loaded.tokenizer, loaded.max_model_len)
        self.usage = UsageIntegral()
        self.kernels: tuple[str, ...] = ()
        self._log = log
        self._weights_bytes = loaded.weights_bytes
        self._cuda = loaded.device.type == "cuda"
        self._scratch = False  # whether a slot is open for what fills up recorded steps
        self._resources = ExitStack()
        try:
            self.arena = self._make_arena()
            self.executor = self._make_executor()
            if self._cuda:
                self._warm_up()
        except AllocatorError as error:
            self.close()
            fits = fit_context(loaded, replace(settings, max_model_len=None), loaded.device.type)
            less = f"use --max-model-len {fits.max_model_len} or less, or fewer --max-num-seqs"
            raise EngineError(
                f"no KV memory can be set up for {self.max_num_seqs} sequences of "
                f"{loaded.max_model_len} tokens: {error}",
                hint="lower --max-num-seqs or --max-model-len" if fits is loaded else less,
            ) from error
        except BaseException:
            self.close()
            raise
        self.scheduler = Scheduler(
            self.arena,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=loaded.max_model_len,
            share=settings.share_prefixes,
            drafts=self._drafts(),
            lookahead=_LOOKAHEAD if self.executor.lag else 0,
        )
        self.engine = Engine(
            self.executor,
            self.scheduler,
            loaded.tokenizer,
            loaded.eos_ids,
            specials=self.generation.specials,
            observe=lambda seconds: self.usage.add(self._usage(), seconds),
            mapping_seconds=lambda: self.arena.work_seconds,
        )

    def measurements(self) -> dict[str, float | str]:
        """The engine's figures so far, by the names of `batchrun.jobs.metrics`."""
        return {
            **asdict(self.engine.stats),
            **self.usage.as_dict(),
            "shared_tokens": self.scheduler.num_shared_tokens,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "max_num_seqs": self.max_num_seqs,
            "preemptions": self.scheduler.num_preemptions,
            "weights_bytes": self._weights_bytes,
            "peak_activations": self._peak_activations(),
            "device": str(self.loaded.device),
            "attention": self.executor.backend.name,
            "model": self.settings.model_name,
        }

    def close(self) -> None:
        """Wait for the device, then give slots, pages and addresses back."""
        self._resources.close()

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_memory(self) -> tuple[VirtualMemory, Callable[[], int]]:
        """The device's memory, and what says how many bytes of it the KV cache may still take.

        Below 0 when another program took more than was left: then the cache gives pages back.
        """
        layout = kv_layout(self.loaded, self.settings, cuda=self._cuda)
        if not self._cuda:
            return HostMemory(layout.page_size, planes=layout.planes, guard=False), available_memory
        memory = CudaMemory(
            self.loaded.device.index or 0, page_size=layout.page_size, planes=layout.planes
        )
        return memory, lambda: memory.memory_info()[0] - DEVICE_HEADROOM

    def _make_arena(self) -> KVArena:
        memory, free = self._make_memory()
        self._resources.callback(memory.close)
        wanted = kv_layout(self.loaded, self.settings, cuda=self._cuda)
        layout = replace(wanted, page_size=memory.granularity, planes=memory.planes)

        def measured() -> int:
            """What the pool may hold: what it has and what is free beside it."""
            held = self.arena.pool.created if hasattr(self, "arena") else 0
            return held * layout.page_bytes + free()

        arena = KVArena(
            memory,
            layout,
            num_slots=self.max_num_seqs + KEPT + self._cuda,  # one for the fillers of graphs
            budget=measured if self.settings.kv_budget is None else self.settings.kv_budget,
            slack=_DEVICE_SLACK if self._cuda else _HOST_SLACK,
            give_back=_GIVE_BACK if self._cuda else None,
        )
        self._resources.callback(arena.release)
        return arena

    def _make_executor(self) -> TorchExecutor:
        loaded, settings = self.loaded, self.settings
        transfers: Transfers = HostTransfers()
        lag = 0
        if self._cuda:
            lag = int(settings.overlap and not self._waits_for_tokens())
            transfers = CudaTransfers(loaded.device, lag)
        self._resources.callback(transfers.drain)
        geometry = Geometry(
            layers=loaded.layers,
            slot_tokens=self.arena.layout.slot_tokens,
            num_slots=self.arena.num_slots,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        try:
            backend = attention.create(settings.attention, geometry, transfers.upload, self._log)
        except ValueError as error:
            raise _no_backend(error) from error
        layers = range(len(loaded.layers))
        views = [layer_views(self.arena, i, loaded.dtype, loaded.device) for i in layers]
        groups = range(self.arena.layout.num_groups)
        slabs = [slab_bytes(self.arena, group, loaded.device) for group in groups]
        return TorchExecutor(
            loaded,
            views,
            slabs,
            backend,
            transfers,
            lag=lag,
            relieve=self._relieve,
            processors=self.generation.processors,
        )

    def _waits_for_tokens(self) -> bool:
        """Whether a step's tokens have to be known before the next one's are sampled."""
        names = self.generation.processors.reads_tokens
        if names:
            self._log(
                f"each step waits for the one before it: the model's {' and '.join(names)} "
                "(generation config) look at the tokens so far"
            )
        return bool(names)

    def _drafts(self) -> Drafts | None:
        """Guesses, where attention takes several tokens of each row in one call.

        A call for each such row costs more than it saves; on a GPU a step is planned before the
        tokens of the one before it are known.
        """
        several = self.executor.backend.max_query is None and not self._cuda
        if not self.settings.drafts or self.executor.lag or not several:
            return None
        row = self.loaded.model.config.get_text_config().vocab_size * self.loaded.dtype.itemsize
        # The rows of a tile; vectors multiply 8 rows at a time.
        return Drafts(_DRAFT_LOGITS // row, free=16 if cpu.level() is Level.TILES else 8)

    def _warm_up(self) -> None:
        """Record decode steps, then run the largest steps there can be.

        torch keeps what activations took here, and the KV budget is what is free after that:
        nothing is guessed. Not the other way round: whoever records a graph gives back what torch
        keeps. The pages that were created stay for the first steps.
        """
        torch.cuda.synchronize(self.loaded.device)  # other streams filled what steps read
        if self.settings.graphs:
            self._record()
        most = self.max_num_batched_tokens
        longest = min(most, self.loaded.max_model_len)
        largest = [longest] * (most // longest) + [most % longest]
        self._run_alone(largest)
        pieces = self.executor.pieces
        if pieces is not None:
            pieces.limit = 0
            launch, whole = self._run_alone(largest)
            pieces.limit = int(min(1.0, _RECORDED * launch / whole) * most)
            self._run_alone(largest)
        self._run_alone([1] * min(self.max_num_seqs, most))
        self.executor.transfers.drain()

    def _relieve(self) -> None:
        """Give the device the KV pages that nobody needs, and what torch keeps for later."""
        self._log("the device has no memory for a step: giving unused memory back to it")
        torch.cuda.synchronize(self.loaded.device)
        self.arena.trim()
        torch.cuda.empty_cache()

    def _run_alone(self, lengths: Sequence[int]) -> tuple[float, float]:
        """One step of sequences of so many tokens, or of as many as memory holds.

        Returns:
            The seconds that launching it took, and the whole of it.
        """
        # With top-p, which needs more memory to sample than anything else.
        params = SamplingParams(temperature=1.0, top_p=0.9)
        segments = []
        for row, length in enumerate(filter(None, lengths[: self.max_num_seqs])):
            slot = self.arena.open(length)
            if slot is None:
                break
            if not self.arena.ensure(slot, length):
                self.arena.close(slot, 0)
                break
            sequence = Row(Request(row, 0, (0,) * length, params, 0))
            segments.append(Segment(sequence, slot, 0, length, sampled=True))
        began = launched = time.perf_counter()
        if segments:
            ticket = self.executor.launch(StepPlan(0, tuple(segments)))
            launched = time.perf_counter()
            self.executor.collect(ticket)
        ended = time.perf_counter()
        for segment in segments:
            self.arena.close(segment.slot, 0)
        self.arena.retire(0)
        return launched - began, ended - began

    def _record(self) -> None:
        """Record decode steps now, and let others be recorded when they are met."""
        scratch = self.arena.open(1)
        if scratch is None or not self.arena.ensure(scratch, 1):
            return
        self._scratch = True
        recorder = CudaRecorder()
        if self.executor.backend.capturable:
            self._capture(scratch, recorder)
        self.executor.record_pieces(
            scratch,
            most=self.max_num_batched_tokens,
            sampled=self.max_num_seqs,
            record=CudaPieces(recorder.pool),
            log=self._log,
        )

    def _capture(self, scratch: int, recorder: CudaRecorder) -> None:
        began = time.perf_counter()
        sizes = batch_sizes(self.max_num_seqs)
        try:
            self.executor.capture(sizes, scratch, recorder)
        except (RuntimeError, EngineError) as error:
            self.executor.graphs = None
            reason = str(error).splitlines()[0]
            self._log(f"decode steps are launched kernel by kernel: no CUDA graph ({reason})")
        else:
            seconds = time.perf_counter() - began
            self._log(f"recorded decode steps of {len(sizes)} sizes in {seconds:.1f} s")

    def _usage(self) -> Usage:
        """The arena's, without the slot of the fillers, which is no sequence."""
        usage, layout = self.arena.usage(), self.arena.layout
        if not self._scratch:
            return usage
        return replace(
            usage,
            live=usage.live - layout.bytes_per_token,
            static=usage.static - static_bytes(layout, 1),
            paged=usage.paged - paged_bytes(layout, 1),
        )

    def _peak_activations(self) -> int:
        """Bytes that torch held on the GPU at most, beside the weights; 0 on a CPU."""
        if not self._cuda:
            return 0
        held = torch.cuda.max_memory_reserved(self.loaded.device)
        return max(0, held - self._weights_bytes)


def assemble(
    loaded: LoadedModel, settings: Settings, log: Callable[[str], None] = lambda _: None
) -> Assembly:
    """Make a model faster where that pays, and put its engine together: see `Assembly`."""
    compiled = loaded.device.type == "cuda"
    made = optimize(loaded.model, compile=compiled, log=log) if settings.optimize else ()
    assembly = Assembly(loaded, settings, log)
    recorded = ("recorded pieces",) * (assembly.executor.pieces is not None)
    assembly.kernels = (assembly.executor.backend.name, *made, *recorded)
    return assembly


def kv_layout(loaded: LoadedModel, settings: Settings, *, cuda: bool) -> KVLayout:
    """The shape of a model's KV memory. A device's driver may make its pages larger."""
    layers = tuple(LayerKV(s.kv_heads, s.k_dim, s.v_dim) for s in loaded.layers)
    element, per_slab = loaded.dtype.itemsize, settings.layers_per_slab
    if per_slab is None:
        dense = not cuda and max(layer.width for layer in layers) * element < PAGESIZE
        per_slab = 1 if dense else len(layers)
    per_slab = min(per_slab, len(layers))
    page_size = settings.page_size
    if page_size is None and cuda:
        slab = sum(layer.width for layer in layers) * element * per_slab / len(layers)
        page_size = max(_LEAST_DEVICE_PAGE, 1 << round(log2(_DEVICE_PAGE_TOKENS * slab)))
    elif page_size is None:
        fair = 1 << (_HOST_PAGE // -(-len(layers) // per_slab)).bit_length() - 1
        page_size = max(_LEAST_HOST_PAGE, fair)
    planes = planes_of(layers, per_slab)
    return KVLayout(layers, element, page_size, loaded.max_model_len, per_slab, planes)


def fit_context(loaded: LoadedModel, settings: Settings, device: str) -> LoadedModel:
    """Give a model whose slots exceed the address space a shorter context, if none was asked for.

    Each sequence reserves addresses for the whole context, and there are 2^47 for all of a process.
    """
    limits = LIMITS[device.partition(":")[0]]
    seqs = settings.max_num_seqs or limits.max_num_seqs
    layout = kv_layout(loaded, settings, cuda=device != "cpu")
    most = _MOST_ADDRESSES // ((seqs + KEPT + 1) * layout.bytes_per_token)
    if settings.max_model_len is not None or layout.slot_tokens <= most:
        return loaded
    limit = 1 << most.bit_length() - 1
    note = (
        f"context of {limit:,} of {loaded.max_model_len:,} tokens: more for each of {seqs} "
        "sequences would exceed a process's addresses; --max-model-len with fewer --max-num-seqs "
        "goes further"
    )
    return replace(loaded, max_model_len=limit, notes=(*loaded.notes, note))


def check_backend(
    loaded: LoadedModel, settings: Settings, device: str, max_num_seqs: int, step_tokens: int
) -> None:
    """Refuse, before there are weights, an attention backend that was asked for by name.

    Raises:
        EngineError: It can't serve this model on this device.
    """
    cuda = device != "cpu"
    geometry = Geometry(
        layers=loaded.layers,
        slot_tokens=kv_layout(loaded, settings, cuda=cuda).slot_tokens,
        num_slots=max_num_seqs + KEPT + cuda,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        dtype=loaded.dtype,
        device=torch.device(device),
    )
    try:
        attention.check(settings.attention, geometry)
    except ValueError as error:
        raise _no_backend(error) from error


def _no_backend(error: ValueError) -> EngineError:
    return EngineError(
        str(error), hint="use --attention auto; `batchrun doctor` says what works here"
    )


def available_memory() -> int:
    """Bytes that the KV cache may still take: what is free here and now, less some headroom."""
    return machine.available_memory() - _HOST_HEADROOM
