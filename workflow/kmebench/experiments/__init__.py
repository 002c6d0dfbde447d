"""Experiments: the grid of runs and the editing sessions."""
