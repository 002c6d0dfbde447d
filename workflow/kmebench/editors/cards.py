"""What an editor is, said once. Imports no torch, so the workflow reads it while it plans.

A card says what an editor is called, where it lives, what its values are and which cached stages
it needs. Grid, rules, command line and docs ask the card; nothing compares names.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from kmebench.editors.needs import Need, Pipeline
from kmebench.errors import ConfigError
from kmebench.names import nearest

#: Installed packages name their cards under this entry point group.
ENTRY_POINTS = "kmebench.editors"
#: Modules with the cards of this library, each in a list ``CARDS``. Named, not imported: an edit
#: depends on its own editor's code alone (planning/dependencies.py).
_MODULES = tuple(
    f"kmebench.editors.{family}.cards"
    for family in (
        "control",
        "finetune",
        "kn",
        "locate",
        "memory",
        "pac",
    )
)
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

#: Makes a class of hyper-parameters: frozen; every field with a type, a default and a sentence.
hyperparameters = partial(
    pydantic.dataclasses.dataclass,
    frozen=True,
    config=pydantic.ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False),
)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


def about(sentence: str, unit: str = "", **bounds: Any) -> Any:
    """Describe a hyper-parameter: a sentence, its unit, and pydantic's bounds."""
    return Field(description=sentence, json_schema_extra={"unit": unit}, **bounds)


#: Numbers of hyper-parameters. Written as text, as YAML reads ``1e-4``, they are numbers too.
Real = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Layers = Annotated[tuple[Whole, ...], Field(min_length=1)]


def _nothing(hparams: Any, pipeline: Pipeline) -> tuple[Need, ...]:
    return ()


@dataclass(frozen=True)
class Card:
    """An editor, without its code.

    ``needs`` says which cached stages a run with given values in a given pipeline reads.
    ``single`` holds the values that differ for one fact by itself, of which no stage of a data
    set is cached. A ``control`` is a row to compare with, never a rival.
    """

    name: str
    implementation: str  # "module:Class", imported only where a model is
    hparams: type
    family: str
    citation: str
    needs: Callable[[Any, Pipeline], tuple[Need, ...]] = _nothing
    single: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False

    @property
    def module(self) -> str:
        """The module of the implementation."""
        return self.implementation.partition(":")[0]

    def load(self) -> Any:
        """Import the editor's class.

        Raises:
            ConfigError: it cannot be imported.
        """
        return _imported(self.implementation, f"The editor {self.name!r}")

    def values(self, settings: Mapping[str, Any], where: str = "") -> Any:
        """Return the hyper-parameters with ``settings``, under their config names, put in.

        Raises:
            ConfigError: the editor has no such value, or it cannot be that; begins with ``where``.
        """
        begin = f"{where}: " if where else ""
        given: dict[str, Any] = {}
        for key, value in settings.items():
            name = self.names.get(key)
            if name is None:
                known = list(dict.fromkeys(self.names.values()))
                raise ConfigError(
                    f"{begin}the editor {self.name!r} has no hyper-parameter {key!r}; "
                    f"{nearest(key, known)}"
                )
            if name in given:
                raise ConfigError(f"{begin}{name} is set twice, once as {key}; take one out.")
            given[name] = value
        try:
            return TypeAdapter(self.hparams).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            what = f"the editor {self.name!r} cannot take these values"
            if first["loc"]:
                name = str(first["loc"][0])
                what = f"{name} cannot be {given[name]!r} in the editor {self.name!r}"
            raise ConfigError(f"{begin}{what}: {reason}.") from error

    @property
    def names(self) -> dict[str, str]:
        """Config names by themselves, and by the name in Python where a keyword is one."""
        fields = [each.name for each in dataclasses.fields(self.hparams)]
        configured = list(plain(self.hparams()))
        return dict(zip(configured, configured, strict=True)) | dict(
            zip(fields, configured, strict=True)
        )


def plain(hparams: Any) -> dict[str, Any]:
    """Return hyper-parameters under their config names, as YAML and JSON hold them."""
    if not dataclasses.is_dataclass(hparams):
        raise TypeError(f"{hparams!r} are no hyper-parameters")
    plain: dict[str, Any] = TypeAdapter(type(hparams)).dump_python(
        hparams, mode="json", by_alias=True
    )
    return plain


@cache
def registered() -> dict[str, Card]:
    """Return the cards of this library and of installed packages, by name.

    Raises:
        ConfigError: an entry point names no card, or two cards have one name.
    """
    own = [card for module in _MODULES for card in importlib.import_module(module).CARDS]
    cards: dict[str, Card] = {}
    brought = [_card(point.value) for point in entry_points(group=ENTRY_POINTS)]
    for card in [*own, *brought]:
        if card.name in cards:
            raise ConfigError(f"Two installed editors are called {card.name!r}; uninstall one.")
        cards[card.name] = card
    return cards


def card_of(name: str) -> Card:
    """Return the card of an editor: a registered name, or ``package.module:CARD``.

    Raises:
        ConfigError: there is no such editor; names the nearest one.
    """
    if name in registered():
        return registered()[name]
    if not _TARGET.fullmatch(name):
        raise ConfigError(
            f"There is no editor {name!r} (one of your own is named 'package.module:CARD'); "
            f"{nearest(name, registered())}"
        )
    return _card(name)


def _card(target: str) -> Card:
    card = _imported(target, f"The card {target!r}")
    if not isinstance(card, Card):
        raise ConfigError(
            f"{target} is no card but a {type(card).__name__}; name a kmebench.editors.cards.Card."
        )
    return card


def _imported(target: str, what: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} cannot be imported: {error}") from error
