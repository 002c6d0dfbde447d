"""Errors that are sentences to the user.

Every failure that a user can mend is a :class:`KMEBenchError`: one sentence saying what
is wrong, where (file, key, record) and what to do. Anything else is a bug and keeps its
traceback.
"""


class KMEBenchError(Exception):
    """Base of all errors a user can mend; ``str(error)`` is one sentence."""


class DataError(KMEBenchError):
    """A data set cannot be fetched, read or selected from."""


class ModelError(KMEBenchError):
    """A model cannot be found, loaded or laid out."""


class EditError(KMEBenchError):
    """An editor cannot carry out an edit."""


class ConfigError(KMEBenchError):
    """The configuration asks for something that does not exist or contradicts itself."""
