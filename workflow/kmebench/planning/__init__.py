"""From the config to the jobs. Imports no torch."""
