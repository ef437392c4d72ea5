"""The offline continuous-batching engine: requests with token ids in, sampled token ids out."""
