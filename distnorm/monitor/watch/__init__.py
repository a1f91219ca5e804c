"""`distnorm watch`: runs that are followed while they train, as a page on this machine or in a terminal."""
