"""Triton's kernels on a CPU, by its interpreter: right, and the same bits however rows are cut."""
