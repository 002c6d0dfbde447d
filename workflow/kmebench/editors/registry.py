"""Which editors there are. Imports no torch, so the workflow can read it while it plans."""

import re

from kmebench.errors import ConfigError
from kmebench.names import nearest

#: Editor name in the config -> "module:class".
EDITORS: dict[str, str] = {
    "pac": "kmebench.editors.pac.pac:PAC",
    "pac-released": "kmebench.editors.pac.released:PACReleased",
    "full-c": "kmebench.editors.finetune.full_c:FullC",
    "rome": "kmebench.editors.locate.rome:ROME",
    "r-rome": "kmebench.editors.locate.r_rome:RROME",
    "memit": "kmebench.editors.locate.memit:MEMIT",
    "pmet": "kmebench.editors.locate.pmet:PMET",
    "emmet": "kmebench.editors.locate.emmet:EMMET",
    "alphaedit": "kmebench.editors.locate.alphaedit:AlphaEdit",
    "prune": "kmebench.editors.locate.prune:PRUNE",
    "rect": "kmebench.editors.locate.rect:RECT",
    "kn": "kmebench.editors.kn.kn:KN",
    "lora": "kmebench.editors.finetune.lora:LoRA",
}

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def editor_target(name: str) -> tuple[str, str]:
    """Return (module, class) of an editor: a registered name, or ``package.module:Class``.

    Raises:
        ConfigError: no such editor; names the nearest one.
    """
    target = EDITORS.get(name, name)
    module, _, class_name = target.partition(":")
    if not _TARGET.fullmatch(target):
        raise ConfigError(
            f"There is no editor {name!r} (one of your own is named 'package.module:Class'); "
            f"{nearest(name, EDITORS)}"
        )
    return module, class_name
