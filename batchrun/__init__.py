"""batchrun: run a whole dataset through an open LLM on your own hardware, unattended."""
