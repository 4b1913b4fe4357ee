"""How a part of a run declares its settings: fields are flags, and marks are rules for them."""

from megatron_mimo.settings.check import (
    check_bounds,
    check_fields,
    check_multiple,
    check_settings,
    unmet,
)
from megatron_mimo.settings.declared import Declared, declared, values
from megatron_mimo.settings.marks import (
    AtLeast,
    Bound,
    Choice,
    Derived,
    File,
    Folder,
    InsteadOf,
    MoreThan,
    Number,
    OnlyWith,
    Part,
    Real,
    Switch,
    Within,
    named,
)

__all__ = [
    "AtLeast",
    "Bound",
    "Choice",
    "Declared",
    "Derived",
    "File",
    "Folder",
    "InsteadOf",
    "MoreThan",
    "Number",
    "OnlyWith",
    "Part",
    "Real",
    "Switch",
    "Within",
    "check_bounds",
    "check_fields",
    "check_multiple",
    "check_settings",
    "declared",
    "named",
    "unmet",
    "values",
]
