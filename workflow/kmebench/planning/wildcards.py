"""What functions of a rule are told of the file that it makes."""

from typing import Protocol


class Wildcards(Protocol):
    """Snakemake's wildcards by name. A rule has those of its own files' names, and no others."""

    model: str
    data: str  # a data set of the config
    dataset: str  # one that is run on: a data set or its development split
    mode: str
    method: str
    variant: str
    seed: str
    # stages
    selection: str
    target: str
    factor: str
    trained: str
    editor: str
    settings: str
    # what is reported
    experiment: str
    comparison: str
    table: str
    figure: str
    notebook: str
