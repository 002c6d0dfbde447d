"""What an editor is, said once. Imports no torch, so the workflow reads it while it plans.

A card says what an editor is called, where it lives, what its values are and which cached stages
it needs. Grid, rules, command line and docs ask the card; nothing compares names.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import entry_points
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from kmebench.editors.needs import Need, Pipeline, check_names
from kmebench.editors.sizes import Job, as_much_again
from kmebench.errors import ConfigError, KMEBenchError
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
        "gradient",
        "hyper",
        "kn",
        "locate",
        "memory",
        "pac",
    )
)
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
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
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Layers = Annotated[tuple[Whole, ...], Field(min_length=1)]


def _nothing(hparams: Any, pipeline: Pipeline) -> tuple[Need, ...]:
    return ()


@dataclass(frozen=True)
class Card:
    """An editor, without its code.

    ``needs`` says which cached stages a run with given values in a given pipeline reads.
    ``summary`` says in a sentence how it edits.
    ``single`` holds the values that differ for one fact by itself, of which no stage of a data
    set is cached. A ``control`` is a row to compare with, never a rival.
    ``holds`` says how many bytes of memory an edit takes beside the weights.
    """

    name: str
    implementation: str  # "module:Class", imported only where a model is
    hparams: type
    family: str
    citation: str
    needs: Callable[[Any, Pipeline], tuple[Need, ...]] = _nothing
    summary: str = ""
    single: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    holds: Callable[[Any, Job], float] = as_much_again

    def needs_of(self, values: Any, pipeline: Pipeline) -> tuple[Need, ...]:
        """Return which cached stages a run reads.

        Raises:
            ConfigError: the card cannot tell (a package's may be wrong), the values make a name
                that no file can have, or two files have one key.
        """
        try:
            needs = tuple(self.needs(values, pipeline))
        except KMEBenchError:
            raise
        except Exception as error:
            raise ConfigError(
                f"The card of the editor {self.name!r} cannot say what the editor needs "
                f"({_told(error)}); mend its function needs(hparams, pipeline)."
            ) from error
        for need in needs:
            if not isinstance(need, Need):
                raise ConfigError(
                    f"The card of the editor {self.name!r} needs {need!r}, which is no "
                    "kmebench.editors.needs.Need; mend its function needs."
                )
        check_names(self.name, needs)
        return needs

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
                alias = next(k for k in settings if self.names.get(k) == name != k)
                raise ConfigError(f"{begin}{name} is set twice, once as {alias}; take one out.")
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

    def configured(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings under their config names, so that a later one goes before an earlier."""
        return {self.names.get(key, key): value for key, value in settings.items()}

    @cached_property
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


def registered() -> dict[str, Card]:
    """Return the cards of this library and of installed packages, by name, that can be used."""
    return {name: card for name, card in _found().items() if isinstance(card, Card)}


@cache
def _found() -> dict[str, Card | ConfigError]:
    """Return all cards by name; what cannot be used is a complaint, told to who asks for it."""
    own = [card for module in _MODULES for card in importlib.import_module(module).CARDS]
    found: dict[str, Card | ConfigError] = {card.name: card for card in own}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            card = _card(point.value)
        except ConfigError as error:
            found.setdefault(point.name, error)
            continue
        twice = ConfigError(f"Two installed editors are called {card.name!r}; uninstall one.")
        found[card.name] = twice if card.name in found else card
    return found


def card_of(name: str) -> Card:
    """Return the card of an editor: a registered name, or ``package.module:CARD``.

    Raises:
        ConfigError: there is no such editor (names the nearest one), or it cannot be used.
    """
    found = _found().get(name)
    if isinstance(found, ConfigError):
        raise found
    if found:
        return found
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
    if not (isinstance(card.name, str) and _NAME.fullmatch(card.name)):
        raise ConfigError(
            f"The card {target!r} calls its editor {card.name!r}; a name holds small letters, "
            "digits, dots and dashes."
        )
    try:
        plain(card.hparams())
    except Exception as error:
        raise ConfigError(
            f"The hyper-parameters of the card {target!r} cannot be used ({_told(error)}); make "
            "them a class of @hyperparameters whose fields all have defaults."
        ) from error
    return card


def _imported(target: str, what: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # code of others may raise anything
        raise ConfigError(f"{what} cannot be imported: {_told(error)}.") from error


def _told(error: Exception) -> str:
    """Return an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
