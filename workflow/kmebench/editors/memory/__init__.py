"""Editors that remember facts beside the weights."""
