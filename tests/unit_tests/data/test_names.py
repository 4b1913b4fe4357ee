"""What the package offers is loaded when it is asked for."""

import pytest

from megatron_mimo import data


def test_every_name_leads_to_what_it_names() -> None:
    for name in data.__all__:
        # `Inputs` names a mapping type, whose own name is that of the mapping.
        assert name == "Inputs" or getattr(data, name).__name__ == name


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"megatron_mimo\.data' has no attribute 'Loader'"):
        data.Loader  # noqa: B018
