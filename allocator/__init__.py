"""Virtual memory for tensors that grow in place. Knows nothing of LLM engines or jobs."""
