"""A small job on disk, as every test of the job layer starts from."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.folder import create
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"id": [7, 8, 9], "prompt": ["one", "two", "three"]}), path)
    return path


@pytest.fixture
def spec(prompts, tmp_path):
    return JobSpec(
        inputs=(InputFile.of(prompts),),
        input_format="parquet",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(name="tiny", path="/models/tiny", fingerprint="m1", dtype="float32"),
        sampling=SamplingSpec(max_tokens=8, temperature=0.7),
        seed=1,
        output=OutputSpec(path=str(tmp_path / "out.parquet"), format="parquet"),
        runtime=RuntimeSpec(max_num_seqs=8, device="cpu"),
    )


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def make_job(home, spec):
    """Makes a job of the default specification with some fields replaced."""

    def make(**changes):
        return create(home, replace(spec, **changes))

    return make


@pytest.fixture
def job(make_job):
    return make_job()
