"""Benchmarks: each prints its machine, its command and a baseline measured in the same run."""
