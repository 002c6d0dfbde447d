"""Options of the commands. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any

from kmebench.cli import arguments
from kmebench.data.records import SLOT

#: The option of an edited model's folder.
_OUT: dict[str, Any] = {"type": arguments.new_folder("--out"), "metavar": "FOLDER"}
#: The shells that completion is written for.
SHELLS = ("bash", "zsh", "fish")


def edit(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench edit``."""
    _config(parser)
    _model(parser)
    _fact(parser)
    parser.add_argument("--method", default="pac", help="a method of the config, or an editor")
    parser.add_argument(
        "--set",
        type=arguments.setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a hyper-parameter (steps=10, layers=[0,1], norm_constraint=null); may be "
        "repeated",
    )
    parser.add_argument(
        "--covariance",
        type=arguments.existing_file("--covariance"),
        metavar="FILE",
        help="covariance of the keys, for ROME, MEMIT and their family (default: the workflow's, "
        "else measured once)",
    )
    parser.add_argument(
        "--neighbour",
        type=arguments.neighbour,
        action="append",
        metavar="TEXT",
        help="a prompt whose answer should stay; may be repeated (default: the same question "
        "about other subjects of OpenFacts)",
    )
    parser.add_argument(
        "--save-delta",
        type=arguments.new_file("--save-delta"),
        metavar="FILE",
        help="write the edit, for kmebench apply",
    )
    parser.add_argument("--out", **_OUT, help="write the edited model, to a new folder")
    parser.add_argument(
        "--plot",
        type=arguments.new_file("--plot", (".svg",)),
        metavar="FILE",
        help="draw what is shown (.svg)",
    )


def trace(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench trace``."""
    _config(parser)
    _model(parser)
    _fact(parser)
    count = arguments.count("--paths")
    parser.add_argument("--paths", type=count, default=15, help="paths per fact (default: 15)")
    parser.add_argument("--score", choices=["l2", "signed_sum"], default="l2")
    plot = arguments.new_file("--plot", arguments.PLOTS)
    parser.add_argument("--plot", type=plot, metavar="FILE", help="draw it (.png, .pdf, .svg)")


def apply(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench apply``."""
    _config(parser)
    _model(parser)
    parser.add_argument("delta", type=arguments.existing_file("delta"), help="a delta.safetensors")
    parser.add_argument("--out", **_OUT, required=True, help="where to write it, a new folder")


def check(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench check-config``."""
    _config(parser)
    parser.add_argument(
        "--explain",
        metavar="MODEL/METHOD/MODE",
        help="show every value of such runs, and the file or default that it comes from",
    )


def plan(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench plan``."""
    _config(parser)
    parser.add_argument(
        "--measured",
        type=arguments.existing_folder("--measured"),
        nargs="+",
        default=[Path("results"), Path("reference")],
        metavar="FOLDER",
        help="finished runs to take seconds per edit from (default: results and reference)",
    )
    devices = arguments.count("--devices")
    parser.add_argument("--devices", type=devices, nargs="+", default=[1, 8, 64], metavar="N")


def editors(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench editors``."""
    parser.add_argument(
        "name", nargs="?", metavar="EDITOR", help="an editor, or package.module:CARD"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench evaluate``."""
    parser.add_argument(
        "folder",
        type=arguments.model_folder,
        metavar="FOLDER",
        help="a Hugging Face folder, such as kmebench edit --out writes",
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="tasks or groups of the harness"
    )
    parser.add_argument(
        "--include",
        type=arguments.existing_folder("--include"),
        metavar="FOLDER",
        help="a folder with tasks of your own (YAML)",
    )
    parser.add_argument(
        "--limit",
        type=arguments.count("--limit"),
        metavar="N",
        help="the first N documents of each task (default: all)",
    )
    parser.add_argument(
        "--batch-size", type=arguments.count("--batch-size"), default=8, metavar="N"
    )
    parser.add_argument(
        "--out",
        type=arguments.new_file("--out", (".json",)),
        metavar="FILE",
        help="write all results (.json)",
    )
    _loading(parser)


def completion(parser: argparse.ArgumentParser) -> None:
    """Options of ``kmebench completion``."""
    parser.add_argument("shell", choices=SHELLS)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=arguments.model,
        required=True,
        help="a model of the config, a Hugging Face folder, a .gguf file, or an id of the hub",
    )
    parser.add_argument(
        "--revision", help="of an id of the hub (default: the newest, which may change)"
    )
    _loading(parser)


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16 or float64 (default: the config's, else float32)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, mps, cuda, cuda:1, balanced or sequential (default: auto)",
    )


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configfile",
        "--config",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files merged over config.yaml, as Snakemake's option of that name does",
    )


def _fact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subject", required=True, help="who or what the fact is about")
    parser.add_argument(
        "--prompt", required=True, help=f"a sentence's beginning, {SLOT} for the subject"
    )
    parser.add_argument("--target", required=True, help="how it should go on")
