"""Public reference code, run from a user's own clone beside the editors of this project."""
