"""Several engines for one job: a coordinator owns the job, workers compute its rows."""
