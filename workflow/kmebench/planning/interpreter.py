"""The Python that Snakemake starts its scripts with."""

import re

from kmebench.errors import ConfigError

#: What a shell reads as more than a part of a path.
_SPECIAL = re.compile(r"""[\s"'`$&;()<>|\\*?\[\]{}!#~]""")


def check_interpreter(executable: str) -> None:
    """Refuse an interpreter that script rules cannot start: Snakemake does not quote its path.

    Raises:
        ConfigError: the path holds a blank or another character that a shell does not take as is.
    """
    if _SPECIAL.search(executable):
        raise ConfigError(
            f"The path of Python, {executable}, holds a blank or a character that is special to "
            "the shell; Snakemake's scripts fail there. Move this folder, or make the environment, "
            "to where the path holds none."
        )
