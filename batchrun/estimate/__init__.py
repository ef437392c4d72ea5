"""What a job will take, before it runs and without its weights."""
