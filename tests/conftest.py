"""The embedded default model, converted once for a whole test run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from batchrun.models import DEFAULT_MODEL, ModelRef, resolve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where the converted model is kept between test runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "batchrun-tests" / "models"


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> ModelRef:
    return resolve(DEFAULT_MODEL, model_cache)


@pytest.fixture(scope="session")
def tokenizer(smollm2: ModelRef) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - not for tests that need no model

    return AutoTokenizer.from_pretrained(smollm2.path)
