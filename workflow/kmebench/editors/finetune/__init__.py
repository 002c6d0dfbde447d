"""Fine-tuning and its constrained forms."""
