"""Editors: functions from edit requests to a weight delta."""
