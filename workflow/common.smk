"""Checks the config and names what rules read and are told. Holds no rule.

This file lies directly in workflow/ so that Snakemake puts that folder on sys.path: the
library is importable here, in scripts and in cluster jobs without being installed.
"""

import sys

from kmebench import forkserver
from kmebench.io.writable import check_writable
from kmebench.planning import grid
from kmebench.planning.config import check_config
from kmebench.planning.dependencies import code
from kmebench.planning.inputs import (
    OPENFACTS,
    METRIC,
    MINUTES,
    MODE,
    SELECTION,
    TARGET,
    VARIANT,
    Inputs,
    one_of,
    openfacts_tables,
)
from kmebench.planning.interpreter import check_interpreter
from kmebench.planning.notebooks import MODEL_NOTEBOOKS, TABLE_NOTEBOOKS, Notebooks
from kmebench.planning.overlays import read_overlay
from kmebench.planning.page import Page
from kmebench.planning.reported import CLAIMS, Reported
from kmebench.planning.warnings import mirror_of, warnings_of

given = (
    workflow.config_settings
)  # on the command line: wins, but Snakemake lists it first
config_files = [*workflow.configfiles[len(given.configfiles) :], *given.configfiles]
# Reading them again refuses a key that stands twice; Snakemake does not.
config_parts = {path: read_overlay(path) for path in config_files}
check_config(config, {**config_parts, "--config": given.config})
check_interpreter(sys.executable)
if workflow.is_main_process:  # not in the process of a job
    for warning in warnings_of(config):
        print(f"Warning: {warning}", file=sys.stderr)

RESULTS = str(workflow.pathvars.get("results"))  # unless the config moves it (pathvars)
MIRROR = mirror_of(config)


def elsewhere():
    """Whether other machines run the jobs: known once the run has begun.

    The executor of a dry run is its own. Then we go by --jobs, which all but local ones must have.
    """
    if workflow.dryrun:
        return workflow.resource_settings.nodes is not None
    return not workflow.local_exec


inputs = Inputs(config, RESULTS, MIRROR, elsewhere)
reported = Reported(config, RESULTS)
page = Page(reported)
notebooks = Notebooks(config, RESULTS)
