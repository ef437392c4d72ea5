"""What a job did, for people to read."""
