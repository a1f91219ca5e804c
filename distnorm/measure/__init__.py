"""One step's total norm: gradients read, their local statistic, and the one all-reduce."""
