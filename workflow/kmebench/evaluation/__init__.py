"""Evaluation: predictions of a model, and metrics from predictions alone."""
