"""Second moments of FFN keys: the covariance that locate-and-edit editors need."""
