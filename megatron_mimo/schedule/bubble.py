"""The share of a step in which stages of a pipeline wait for their first and last microbatch."""


def bubble(stages: int, microbatches: int) -> float:
    """Fraction of a 1F1B step in which a stage has no work, 0 to 1, with stages of equal work.

    Args:
        stages: Number of pipeline stages.
        microbatches: Number of microbatches of the step.
    """
    return (stages - 1) / (microbatches + stages - 1)


def few_microbatches(flag: str, stages: int, microbatches: int) -> str | None:
    """A warning where some stages wait during the whole step; None where there is none to give.

    Args:
        flag: Flag that sets the number of stages.
        stages: Number of pipeline stages.
        microbatches: Number of microbatches of the step.
    """
    if microbatches >= stages:
        return None
    return (
        f"warning: {microbatches} microbatch{'' if microbatches == 1 else 'es'} a step with {flag} "
        f"{stages}: every stage has nothing to do in {bubble(stages, microbatches):.0%} of it; "
        f"raise --global-batch-size, or lower {flag} or --micro-batch-size"
    )
