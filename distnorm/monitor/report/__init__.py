"""`distnorm report` and `distnorm suggest-threshold`: a run's files as one page, and as percentiles. They need no torch."""
