"""Edits: what an editor returns, and how a model carries them."""
