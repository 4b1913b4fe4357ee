"""What stands in a folder of tar shards that `megatron-mimo data prepare` indexes."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mimo.data.webdataset import group_members
from megatron_mimo.tools.data.forms import wrong_sample
from megatron_mimo.tools.data.sources import Problem

_FOLDERS = ("train", "val")


@dataclass(kw_only=True, slots=True)
class ShardSurvey:
    """What is in the shards.

    Attributes:
        in_folders: Whether they stand in folders train and val, their splits.
        shards: Path of each readable shard -> its good samples.
        num_samples: In all, bad ones too; a shard that cannot be read counts as one.
        num_bad: Bad samples and shards.
        bad_samples: Shard and key of each bad sample.
        problems: The first of them.
    """

    in_folders: bool = False
    shards: dict[str, int] = field(default_factory=dict)
    num_samples: int = 0
    num_bad: int = 0
    bad_samples: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def survey_shards(source: Path, image_token: str, *, most: int) -> ShardSurvey:
    """Check every sample of the shards of a folder; of images the frame, as training does.

    Args:
        source: Folder; shards may be deeper.
        image_token: Placeholder of an image in texts.
        most: Problems to keep.

    Raises:
        ValueError: Some shards are in folders train and val, and others not.
    """
    names = sorted(
        str(path.relative_to(source))
        for path in source.rglob("*.tar")
        if not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    inside = [name for name in names if name.split("/", 1)[0] in _FOLDERS and "/" in name]
    if inside and len(inside) < len(names):
        stray = next(name for name in names if name not in inside)
        raise ValueError(
            f"{source} has shards in train/ or val/, and {stray} beside them: move it into one of "
            f"the folders"
        )
    survey = ShardSurvey(in_folders=bool(inside))
    for name in names:
        good = 0
        try:
            for key, problem in _check_shard(source, name, image_token):
                survey.num_samples += 1
                if problem is None:
                    good += 1
                    continue
                survey.bad_samples.append((name, key))
                _add(survey, Problem(where=f"{name} {key}", reason=problem), most)
            if good:
                survey.shards[name] = good
                continue
            reason = "holds no good sample"
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = f"cannot be read: {error}; expected a whole, uncompressed tar file"
        survey.num_samples += 1
        survey.bad_samples = [bad for bad in survey.bad_samples if bad[0] != name]
        _add(survey, Problem(where=name, reason=reason), most)
    if not survey.shards:
        shown = "; ".join(f"{problem.where} {problem.reason}" for problem in survey.problems[:3])
        raise ValueError(f"{source} holds no usable shard: {shown}")
    return survey


def _add(survey: ShardSurvey, problem: Problem, most: int) -> None:
    survey.num_bad += 1
    if len(survey.problems) < most:
        survey.problems.append(problem)


def _check_shard(source: Path, name: str, image_token: str) -> Iterator[tuple[str, str | None]]:
    """Key of each sample, and what is wrong with it."""
    with tarfile.open(source / name, "r:") as tar:
        for key, members in group_members(tar):
            parts: dict[str, bytes] = {}
            for ending, member in members.items():
                file = tar.extractfile(member)
                assert file is not None, member.name
                parts[ending] = file.read()
            yield key, wrong_sample(key, parts, image_token, source)
