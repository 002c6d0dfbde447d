"""Tracing: impact scores of FFN segments and selection of transmission paths."""
