"""Data sets: sources, records, the facts of this repository."""
