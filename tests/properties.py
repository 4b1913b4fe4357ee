"""How many examples a property is tried on: few every day, all of them for a release.

`make test-all` asks for `--hypothesis-profile full`; without it the profile is "quick". Examples
are random, so many quick runs try what a full one does.
"""

from hypothesis import settings

_FULL, _QUICK = 100, 20

settings.register_profile("full", max_examples=_FULL, deadline=None)
settings.register_profile("quick", max_examples=_QUICK, deadline=None)
settings.load_profile("quick")


def examples(number: int) -> settings:
    """Try a property on `number` examples in the full profile, and on a fifth in the quick one."""
    return settings(max_examples=max(1, number * settings().max_examples // _FULL))
