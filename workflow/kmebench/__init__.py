"""KME-Bench: a benchmark of knowledge model editing."""

__version__ = "0.2.0"
