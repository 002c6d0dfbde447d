"""Commands, their help, and the scripts that complete them."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from kmebench.cli.main import main
from kmebench.cli.parser import COMMANDS, parser
from kmebench.editors.cards import registered


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_examples_of_a_command_are_accepted_and_shown(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("edit.safetensors").touch()
    Path("tasks").mkdir()
    Path("results").mkdir()
    made = parser()
    for example in command.examples:
        words = shlex.split(example.partition(" > ")[0])
        if command.name == "evaluate":
            Path("edited").mkdir(exist_ok=True)
            Path("edited/config.json").touch()
        assert made.parse_args(words[1:]).command is command
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    shown = capsys.readouterr().out
    assert all(example in shown for example in command.examples)


COMPLETED = """
source "$1"
COMP_WORDS=(kmebench {words}); COMP_CWORD={place}; COMP_LINE="kmebench {words}"
_shtab_kmebench kmebench "{last}" x
printf "%s\\n" "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ed", {"edit", "editors"}),
        ("edit --met", {"--method"}),
        ("edit --method mem", {"memit", "memit-seq", "memoir"}),
        ("editors gr", {"grace"}),
        ("completion f", {"fish"}),
    ],
)
def test_bash_completes(words, found, tmp_path, capsys):
    script = tmp_path / "kmebench.bash"
    assert main(["completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    parts = words.split()
    program = COMPLETED.format(words=words, place=len(parts), last=parts[-1])
    done = subprocess.run(
        ["bash", "-c", program, "bash", script], capture_output=True, text=True, check=False
    )
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_of_a_shell_names_all_commands_and_editors(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in (*(command.name for command in COMMANDS), *registered()):
        assert name in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)
