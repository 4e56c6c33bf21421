"""Every family there is, by name."""

from __future__ import annotations

import inspect

from cellfate.errors import DataError
from cellfate.model import categorical, ordinal, proportions  # noqa: F401  (their families are found by walking the subclasses)
from cellfate.model.families import Family


def concrete(base: type[Family] = Family) -> list[type[Family]]:
    """Every family that can be used, found by walking the subclasses."""
    # a class without a name of its own is a family in another form
    found = [base] if "name" in vars(base) and not inspect.isabstract(base) else []
    for child in base.__subclasses__():
        found += concrete(child)
    return found


def get_family(name: str, link: str | None = None) -> Family:
    """The family called `name`, with its default link unless `link` is given."""
    known = {family.name: family for family in concrete()}
    if name not in known:
        raise DataError(f"unknown family {name!r}; choose from {', '.join(sorted(known))}.")
    return known[name](link)
