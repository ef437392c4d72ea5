"""Virtual memory for tensors that grow in place. Independent of LLM engines and jobs."""
