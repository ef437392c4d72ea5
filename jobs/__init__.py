"""Durable jobs: rows in, results journalled, files out. Knows nothing of torch or engines."""
