"""Watching a run: what its files say, and what becomes of them."""
