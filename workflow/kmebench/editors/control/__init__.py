"""Rows to compare with."""
