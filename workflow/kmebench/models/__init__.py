"""Models: layouts of the supported families, editable models, sources."""
