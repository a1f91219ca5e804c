"""Adapters for trainers, one file each. Each imports its framework, so import the one that you use."""
