"""Hyper-networks: trained networks that make a gradient into a better edit."""
