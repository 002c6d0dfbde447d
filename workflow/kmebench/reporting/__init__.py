"""Reporting: tables and the published numbers. Imports no torch."""
