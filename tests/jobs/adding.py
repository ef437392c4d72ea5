"""The columns that the output of a job with some options adds."""

from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.columns import output_columns
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec


def added_columns(*, n=1, keep=None, prefix="", token_ids=False, param_columns=(), **sampling):
    return output_columns(
        JobSpec(
            inputs=(),
            input_format="jsonl",
            prompt=PromptSpec(),
            model=ModelSpec(),
            sampling=SamplingSpec(**sampling),
            n=n,
            keep=keep,
            output=OutputSpec(prefix=prefix, token_ids=token_ids),
            runtime=RuntimeSpec(param_columns=param_columns),
        )
    )
