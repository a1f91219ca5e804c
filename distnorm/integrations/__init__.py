"""Adapters for trainers, one file each. Some import their framework, so import the one that you use."""
