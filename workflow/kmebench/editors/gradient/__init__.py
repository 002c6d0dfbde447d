"""Editors that make a change of weights out of one gradient."""
