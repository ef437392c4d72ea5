"""What a job has done, durably: results, partial samples, and digests of the rows read."""
