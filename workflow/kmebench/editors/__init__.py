"""Editors: what turns edit requests into an edit."""
