"""Second moments (uncentred covariances) of the inputs of W2."""
