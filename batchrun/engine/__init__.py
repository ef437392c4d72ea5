"""The offline continuous-batching engine: requests of token ids in, sampled token ids out."""
