"""What commands are asked for, checked before torch or pandas is imported."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kmebench.data.records import EditRequest
from kmebench.evaluation.harness import check_installed
from kmebench.planning.by_hand import Source, checked_loading, fact, find_model, method_of
from kmebench.planning.config import CONFIG, read_checked_config
from kmebench.planning.workflow import check_workflow


@dataclass(frozen=True)
class Inputs:
    """What ``edit`` and ``trace`` start from; ``apply`` starts from the source alone."""

    source: Source
    request: EditRequest
    hparams: Mapping[str, Any] = field(default_factory=dict)  # of --set


def edit_inputs(arguments: argparse.Namespace) -> Inputs:
    """Check the fact, the model, the method and its values.

    Raises:
        KMEBenchError: something asked for does not exist, or contradicts itself.
    """
    found = trace_inputs(arguments)
    hparams = {name: value for setting in arguments.set for name, value in setting.items()}
    method_of(found.source, arguments.method, hparams)
    return Inputs(found.source, found.request, hparams)


def trace_inputs(arguments: argparse.Namespace) -> Inputs:
    """Check the fact and the model; see :func:`edit_inputs`."""
    request = fact(arguments.subject, arguments.prompt, arguments.target)
    return Inputs(apply_inputs(arguments), request)


def apply_inputs(arguments: argparse.Namespace) -> Source:
    """Check the model; see :func:`edit_inputs`."""
    a = arguments
    return find_model(a.model, a.configfile, revision=a.revision, dtype=a.dtype, device=a.device)


def plan_inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check that the workflow is here, and its config.

    Raises:
        ConfigError: it is not, or the config is wrong.
    """
    check_workflow()
    return read_checked_config(CONFIG, arguments.configfile)


def evaluate_inputs(arguments: argparse.Namespace) -> dict[str, str]:
    """Check that the harness is installed, and how the model is to be loaded.

    Raises:
        ConfigError: it is not, or there is no such dtype or device.
    """
    check_installed()
    return checked_loading(arguments.dtype, arguments.device)
