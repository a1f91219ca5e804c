"""The reference trainer: a small language model on any topology, clipped by distnorm's public names only."""
