"""Whether files can be made in a folder, asked before work is done for them."""

import os
from pathlib import Path

from kmebench.errors import ConfigError


def check_writable(option: str, path: Path, folder: Path) -> None:
    """Refuse ``path`` if files cannot be made in ``folder``, which may have to be made first.

    Raises:
        ConfigError: names ``option``, ``path``, and the folder that is none or may not be written.
    """
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not nearest.is_dir():
        raise ConfigError(f"{option} cannot be {str(path)!r}: {nearest} is no folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} cannot be {str(path)!r}: you may not write to {nearest}; mend its "
            "permissions or name another place."
        )
