"""`distnorm report` and `distnorm suggest-threshold`: a run's files as a page, and as percentiles."""
