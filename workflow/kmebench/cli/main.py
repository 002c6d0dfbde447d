"""``kmebench``: the command line.

Commands are imported when they are called, and what they are asked for is checked before torch is.
"""

import argparse
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kmebench import __version__
from kmebench.cli import arguments
from kmebench.data.records import SLOT
from kmebench.io.logs import complaint

#: The option of an edited model's folder.
_OUT: dict[str, Any] = {"type": arguments.new_folder("--out"), "metavar": "FOLDER"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a model's letters
    try:
        chosen = _parser().parse_args(argv)
        chosen.run(chosen)
    except Exception as error:
        told = complaint(error)
        if told is None:
            raise
        print("kmebench:", " ".join(told.splitlines()), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kmebench", description="Edit facts in language models, and plan what that takes."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    config, model, fact = _config_options(), _model_options(), _fact_options()
    _add_edit(
        commands.add_parser(
            "edit", parents=[config, model, fact], help="change one fact and show before and after"
        )
    )
    _add_trace(
        commands.add_parser(
            "trace", parents=[config, model, fact], help="show where a fact's critical paths lie"
        )
    )
    _add_apply(
        commands.add_parser(
            "apply", parents=[config, model], help="make an edited model from a saved edit"
        )
    )
    _add_check(
        commands.add_parser(
            "check-config", parents=[config], help="check a config, and list what it asks for"
        )
    )
    _add_plan(
        commands.add_parser(
            "plan", parents=[config], help="say what a config costs: jobs, hours, disk"
        )
    )
    return parser


def _add_edit(edit: argparse.ArgumentParser) -> None:
    edit.add_argument("--method", default="pac", help="a method of the config, or an editor")
    edit.add_argument(
        "--set",
        type=arguments.setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a hyper-parameter (steps=10, layers=[0,1], norm_constraint=null); may be "
        "repeated",
    )
    edit.add_argument(
        "--covariance",
        type=arguments.existing_file("--covariance"),
        metavar="FILE",
        help="covariance of the keys, for ROME, MEMIT and their family (default: the workflow's, "
        "else measured once)",
    )
    edit.add_argument(
        "--neighbour",
        type=arguments.neighbour,
        action="append",
        metavar="TEXT",
        help="a prompt whose answer should stay; may be repeated (default: the same question "
        "about other subjects of OpenFacts)",
    )
    edit.add_argument(
        "--save-delta",
        type=arguments.new_file("--save-delta"),
        metavar="FILE",
        help="write the edit, for kmebench apply",
    )
    edit.add_argument("--out", **_OUT, help="write the edited model, to a new folder")
    edit.set_defaults(run=_on_a_model("edit"))


def _add_trace(trace: argparse.ArgumentParser) -> None:
    count = arguments.count("--paths")
    trace.add_argument("--paths", type=count, default=15, help="paths per fact (default: 15)")
    trace.add_argument("--score", choices=["l2", "signed_sum"], default="l2")
    plot = arguments.new_file("--plot", arguments.PLOTS)
    trace.add_argument("--plot", type=plot, metavar="FILE", help="draw it (.png, .pdf, .svg)")
    trace.set_defaults(run=_on_a_model("trace"))


def _add_apply(apply: argparse.ArgumentParser) -> None:
    apply.add_argument("delta", type=arguments.existing_file("delta"), help="a delta.safetensors")
    apply.add_argument("--out", **_OUT, required=True, help="where to write it, a new folder")
    apply.set_defaults(run=_on_a_model("apply"))


def _add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "--explain",
        metavar="MODEL/METHOD/MODE",
        help="show every value of such runs, and the file or default that it comes from",
    )
    check.set_defaults(run=_on_a_config("check_command"))


def _add_plan(planned: argparse.ArgumentParser) -> None:
    planned.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[Path("results")],
        metavar="FOLDER",
        help="finished runs to take seconds per edit from (default: results, with its reference)",
    )
    devices = arguments.count("--devices")
    planned.add_argument("--devices", type=devices, nargs="+", default=[1, 8, 64], metavar="N")
    planned.set_defaults(run=_on_a_config("plan_command"))


def _on_a_model(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of :mod:`kmebench.cli.edit`; inputs are checked before torch comes."""

    def run(chosen: argparse.Namespace) -> None:
        inputs = getattr(importlib.import_module("kmebench.cli.inputs"), f"{name}_inputs")(chosen)
        commands = importlib.import_module("kmebench.cli.edit")
        getattr(commands, f"{name}_command")(chosen, inputs)

    return run


def _on_a_config(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of :mod:`kmebench.cli.config`."""

    def run(chosen: argparse.Namespace) -> None:
        getattr(importlib.import_module("kmebench.cli.config"), name)(chosen)

    return run


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--model",
        type=arguments.model,
        required=True,
        help="a model of the config, a Hugging Face folder, a .gguf file, or an id of the hub",
    )
    options.add_argument(
        "--revision", help="of an id of the hub (default: the newest, which may change)"
    )
    options.add_argument(
        "--dtype",
        help="float32, bfloat16, float16 or float64 (default: the config's)",
    )
    options.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, mps, cuda, cuda:1, balanced or sequential (default: auto)",
    )
    return options


def _config_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--configfile",
        "--config",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files merged over config.yaml, as Snakemake's option of that name does",
    )
    return options


def _fact_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--subject", required=True, help="who or what the fact is about")
    options.add_argument(
        "--prompt", required=True, help=f"a sentence's beginning, {SLOT} for the subject"
    )
    options.add_argument("--target", required=True, help="how it should go on")
    return options
