"""What `make gpu-check` measures: one command, one JSON, on one GPU."""
