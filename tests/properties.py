"""How many examples a property is tried on: few every day, all of them for a release.

`make test-all` asks for `--hypothesis-profile full`; without it the profile is "quick". Examples
are random, so many quick runs try what a full one does. `--hypothesis-profile campaign` is for one
property at a time, by hand: 10,000 examples where "full" has 100; `--hypothesis-seed N` repeats it.
"""

from hypothesis import settings

_CAMPAIGN, _FULL, _QUICK = 10_000, 100, 20

settings.register_profile("campaign", max_examples=_CAMPAIGN, deadline=None, database=None)
settings.register_profile("full", max_examples=_FULL, deadline=None)
settings.register_profile("quick", max_examples=_QUICK, deadline=None)
settings.load_profile("quick")


def examples(number: int) -> settings:
    """Try a property on `number` examples in the full profile, and on a fifth in the quick one."""
    return settings(max_examples=max(1, number * settings().max_examples // _FULL))
