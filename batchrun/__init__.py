"""batchrun: run a whole dataset through an open LLM on your own hardware, unattended."""

DISTRIBUTION = "batchrun-llm"  # what it is installed as
