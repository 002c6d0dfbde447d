"""Files: complete or not there, checked when read; logs."""
