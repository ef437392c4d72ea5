"""A CPU with AVX512-BF16 and AMX, on one without: what native code uses of them is emulated."""
