"""What else travels in a step's one all-reduce."""
