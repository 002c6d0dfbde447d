"""The family of ROME: locate a fact, solve for the weights."""
