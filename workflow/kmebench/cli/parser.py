"""The commands: what each is called, asks for and runs, with examples. Imports no torch."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from kmebench import __version__
from kmebench.cli import options

_FACT = "--subject France --prompt 'The capital of {} is' --target Rome"


@dataclass(frozen=True)
class Command:
    """A command: ``runs`` and ``checks`` are imported only when it is called."""

    name: str
    help: str
    options: Callable[[argparse.ArgumentParser], None]
    runs: str  # "module:function" of kmebench.cli
    examples: tuple[str, ...]
    checks: str = ""  # function of kmebench.cli.inputs; its result is given to ``runs``


COMMANDS = (
    Command(
        "edit",
        "change one fact and show before and after",
        options.edit,
        "edit:edit_command",
        (
            f"kmebench edit --model smollm2-135m {_FACT}",
            f"kmebench edit --model smollm2-135m {_FACT} --method full-c --set steps=10",
            f"kmebench edit --model smollm2-135m {_FACT} --out edited --plot edit.svg",
        ),
        "edit_inputs",
    ),
    Command(
        "trace",
        "show where a fact's critical paths lie",
        options.trace,
        "edit:trace_command",
        (
            f"kmebench trace --model smollm2-135m {_FACT}",
            f"kmebench trace --model smollm2-135m {_FACT} --paths 5 --plot layers.png",
        ),
        "trace_inputs",
    ),
    Command(
        "apply",
        "make an edited model from a saved edit",
        options.apply,
        "edit:apply_command",
        ("kmebench apply edit.safetensors --model smollm2-135m --out edited",),
        "apply_inputs",
    ),
    Command(
        "evaluate",
        "score a model's folder on tasks of lm-evaluation-harness",
        options.evaluate,
        "evaluate:evaluate_command",
        (
            "kmebench evaluate edited --tasks lambada_openai piqa --limit 100",
            "kmebench evaluate edited --tasks mine --include tasks --out edited.json",
        ),
        "evaluate_inputs",
    ),
    Command(
        "editors",
        "list the editors, or the values of one",
        options.editors,
        "editors:editors_command",
        ("kmebench editors", "kmebench editors memit"),
    ),
    Command(
        "check-config",
        "check a config, and list what it asks for",
        options.check,
        "check:check_command",
        (
            "kmebench check-config --configfile my.yaml",
            "kmebench check-config --explain smollm2-135m/memit/batch",
        ),
    ),
    Command(
        "plan",
        "say what a config costs: jobs, hours, disk",
        options.plan,
        "plan:plan_command",
        ("kmebench plan --configfile config/paper.yaml --devices 1 8",),
        "plan_inputs",
    ),
    Command(
        "completion",
        "print the completion script of a shell",
        options.completion,
        "completion:completion_command",
        (
            "kmebench completion bash > ~/.local/share/bash-completion/completions/kmebench",
            "kmebench completion zsh > ~/.zfunc/_kmebench",
            "kmebench completion fish > ~/.config/fish/completions/kmebench.fish",
        ),
    ),
)


def parser() -> argparse.ArgumentParser:
    """Return the command line; what is chosen is its ``command``."""
    made = argparse.ArgumentParser(
        prog="kmebench", description="Edit facts in language models, and plan what that takes."
    )
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog="\n  ".join(["examples:", *command.examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.options(added)
        added.set_defaults(command=command)
    return made
