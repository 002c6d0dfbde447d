"""Covariance C = E[k kᵀ], not centred, of the inputs of W2."""
