"""Native code for CPUs: compiled where it runs; without it the engine is only slower."""
