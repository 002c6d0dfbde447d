"""The page of values is written from the cards."""

import dataclasses
from pathlib import Path

from kmebench.editors.cards import registered
from kmebench.planning.values_page import page, section


def test_the_page_in_the_docs_is_that_of_the_cards():
    written = Path("docs/editors-values.md").read_text(encoding="utf-8")
    assert written == page(), "python -m kmebench.planning.values_page > docs/editors-values.md"


def test_every_value_stands_on_the_page_with_default_bounds_and_meaning():
    full_c = section(registered()["full-c"])
    fields = dataclasses.fields(registered()["full-c"].hparams)
    assert full_c.count("\n| `") == len(fields)
    row = next(line for line in full_c.splitlines() if line.startswith("| `norm_constraint`"))
    assert row.startswith("| `norm_constraint` | `0.0005` | number ≥ 0 or null | δ, the largest")
    assert "| `layers` | `null` | list of whole number ≥ 0 or null |" in full_c
    pac = section(registered()["pac"])
    assert "| `lambda` | `0.1` |" in pac
    assert "`l2`, `signed_sum`, `abs_zscore`" in pac
    assert r"N = \|T+\|" in pac
    assert "(nats per target token)." in pac
