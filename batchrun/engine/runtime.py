"""A model and its engine, loaded and checked: what a job runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging as transformers_logging

from batchrun.engine.assembly import Settings, assemble, choose_device, fit_context
from batchrun.engine.cpu.compile import guard_caches
from batchrun.engine.model import gates, loading
from batchrun.engine.model.generation import vocabulary_size, within_vocabulary
from batchrun.engine.shortage import device_errors
from batchrun.machine import keep_freed_memory, return_freed_memory
from batchrun.models import whole
from batchrun.prompts.builder import prompt_builder


class Runtime:
    """A loaded model and the engine around it. Close it to give the memory back.

    Args:
        settings: What to run, and how.
        prompt: Keyword arguments of `PromptBuilder`.
        log: Told, a line each, what the user should know.

    Raises:
        ModelError: The model can't be loaded, or is refused.
    """

    def __init__(
        self, settings: Settings, prompt: Mapping[str, Any], log: Callable[[str], None]
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        return_freed_memory()  # loading and packing leave hundreds of MiB behind
        with device_errors("the weights", None):
            loaded = loading.load(
                settings.model_path,
                name=settings.model_name,
                dtype=settings.dtype,
                quantize=settings.quantize,
                device=choose_device(settings.device, log),
                trust_remote_code=settings.trust_remote_code,
                max_model_len=settings.max_model_len,
            )
        if loaded.device.type == "cuda":
            guard_caches(log)
        self.loaded = fit_context(loaded, settings, str(loaded.device))
        for note in self.loaded.notes:
            log(note)
        builder = prompt_builder(
            self.loaded.tokenizer,
            prompt,
            max_model_len=self.loaded.max_model_len,
            model=settings.model_name,
            log=log,
        )
        vocabulary = vocabulary_size(self.loaded.model)
        self.encode = within_vocabulary(builder, self.loaded.tokenizer, vocabulary)
        self._weights = f"{settings.fingerprint}-{settings.quantize or 'whole'}"
        known = gates.seen(self.loaded, self._weights, settings.cache)
        if not known:
            whole.check_finite(self.loaded.model)
        want = None if known else gates.reference(self.loaded)
        self.assembly = assemble(self.loaded, settings, log)
        self.engine, self.measurements = self.assembly.engine, self.assembly.measurements
        self.generation = self.assembly.generation
        if self.generation.ignored:
            asked = ", ".join(self.generation.ignored)
            log(f"the model's generation config asks for {asked}, which batchrun does not do")
        self.max_num_seqs = self.assembly.max_num_seqs
        self.max_num_batched_tokens = self.assembly.max_num_batched_tokens
        try:
            self._check(want, log)
        except BaseException:
            self.close()
            raise
        keep_freed_memory()

    def _check(self, want: gates.Reference | None, log: Callable[[str], None]) -> None:
        """The third gate."""
        loaded, assembly, settings = self.loaded, self.assembly, self.assembly.settings
        difference = gates.verify_once(
            loaded,
            self._weights,
            settings.cache,
            "-".join(assembly.kernels).replace(" ", "-"),
            lambda: gates.verify(
                loaded, assembly.executor, assembly.arena, assembly.max_num_batched_tokens, want
            ),
        )
        if difference is not None:
            log(f"checked {loaded.architecture} against eager attention: {difference:.1g}")

    def close(self) -> None:
        """Give slots, pages and addresses back."""
        self.assembly.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
