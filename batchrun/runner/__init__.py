"""A job's processes: the supervisor, and the run with its reader, engine loop and writer."""
