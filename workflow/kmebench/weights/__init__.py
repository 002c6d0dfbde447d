"""Weight deltas: what an edit is."""
