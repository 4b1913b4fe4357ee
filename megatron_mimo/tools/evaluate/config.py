"""Flags of `megatron-mimo evaluate`."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import DisallowNone, UseAppendAction, arg

from megatron_mimo.inference.sampling import Sampling
from megatron_mimo.settings import Folder, Number, Part, Switch, Within
from megatron_mimo.settings.ranges import MOST_SAMPLES
from megatron_mimo.tools.evaluate.metrics import Name
from megatron_mimo.tools.evaluate.place import Split
from megatron_mimo.tools.generate.config import ModelFlags


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Ask a trained model every question of a dataset, and score its answers.

    RUN is the folder that --save named, of which the newest checkpoint is taken, or the folder of
    one checkpoint; or a folder of transformers' NemotronH_Omni_Reasoning_V3.

    Attributes:
        data: Dataset of the questions: a JSON Lines or JSON file, the folder of a prepared dataset,
            or the YAML file of a blend.
        metric: Metric to score answers by; give it once for each; left out: multiple-choice for
            samples with choices, exact-match for others.
        split: Split of a prepared dataset; left out: val.
        limit: Largest number of samples, from the first one on; left out: all.
        out: Folder for answers, results and a page; the same command goes on there after it was
            interrupted.
        task_field: Field of the samples by which results are counted apart; left out: task, else
            category.
        image_root: Folder that image paths in a file are relative to; left out: the file's own.
        media_root: Further folder whose files samples may name.
        trust_dataset_code: Whether to run Python that a prepared dataset names.
        json: Whether to print results as JSON.
        sampling: How tokens are chosen.
        model: How the model is loaded.
    """

    data: Annotated[str | None, arg(metavar="DATASET", help_behavior_hint="(required)")] = None
    metric: UseAppendAction[tuple[Name, ...]] = ()
    split: Annotated[DisallowNone[Split | None], arg(help_behavior_hint="")] = None
    limit: Annotated[Number, Within(1, MOST_SAMPLES)] = None
    out: Folder = None
    task_field: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    image_root: Folder = None
    media_root: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR")] = ()
    trust_dataset_code: Switch = False
    json: Switch = False
    sampling: Part[Sampling] = field(default_factory=Sampling)
    model: Part[ModelFlags] = field(default_factory=ModelFlags)
