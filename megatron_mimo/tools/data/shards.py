"""Contents of a folder of tar shards that `megatron-mimo data prepare` indexes."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mimo.border import reason_of
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.reading.webdataset import group_members
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.tools.data.forms import wrong_sample
from megatron_mimo.tools.data.sources import Problem

_FOLDERS = ("train", "val")


class UnsortedError(Exception):
    """Files of one sample are apart from each other.

    Args:
        key: Key of the sample.
    """

    def __init__(self, key: str) -> None:
        super().__init__(
            f"is not in order: the files of sample {key!r} do not follow each other, and readers "
            f"go through a shard once; unpack it, and pack it again with tar --sort=name"
        )


@dataclass(kw_only=True, slots=True)
class ShardSurvey:
    """Result of reading the shards.

    Attributes:
        in_folders: Whether the shards are in folders train and val, which are their splits.
        shards: Number of good samples by path of each readable shard.
        num_samples: Number of all samples, bad ones included; a shard that cannot be read counts as
            one.
        num_bad: Number of bad samples and bad shards.
        bad_samples: Shard and key of each bad sample.
        problems: Problems of the first bad samples.
    """

    in_folders: bool = False
    shards: dict[str, int] = field(default_factory=dict)
    num_samples: int = 0
    num_bad: int = 0
    bad_samples: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def survey_shards(source: Path, inputs: Inputs, media: MediaFolder, *, most: int) -> ShardSurvey:
    """Check every sample of the shards of a folder; items are checked as in training.

    Args:
        source: Path to the folder; shards may be in subfolders.
        inputs: Kinds of items that samples may have.
        media: Files that samples may name.
        most: Largest number of problems to keep.

    Raises:
        ValueError: Some shards are in folders train and val, and others are not.
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
            for key, problem in _check_shard(source / name, inputs, media):
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
        except UnsortedError as error:
            reason = str(error)
            # What was wrong with its samples follows from that.
            survey.problems = [
                problem for problem in survey.problems if not problem.where.startswith(f"{name} ")
            ]
        # A damaged archive makes tarfile raise nearly anything.
        except Exception as error:
            reason = f"cannot be read: {reason_of(error)}; expected a whole, uncompressed tar file"
        survey.num_samples += 1
        survey.bad_samples = [bad for bad in survey.bad_samples if bad[0] != name]
        _add(survey, Problem(where=name, reason=reason), most)
    if not survey.shards:
        shown = "; ".join(problem.line for problem in survey.problems[:3])
        raise ValueError(f"{source} holds no usable shard: {shown}")
    return survey


def _add(survey: ShardSurvey, problem: Problem, most: int) -> None:
    survey.num_bad += 1
    if len(survey.problems) < most:
        survey.problems.append(problem)


def _check_shard(
    shard: Path, inputs: Inputs, media: MediaFolder
) -> Iterator[tuple[str, str | None]]:
    """Key of each sample, and its problem if there is one."""
    endings: dict[str, set[str]] = {}
    if not shard.is_file():
        raise tarfile.ReadError("it is not a file")
    with tarfile.open(shard, "r:") as tar:
        for key, members in group_members(tar):
            if key in endings and endings[key].isdisjoint(members):
                raise UnsortedError(key)
            endings.setdefault(key, set()).update(members)
            parts: dict[str, bytes] = {}
            for ending, member in members.items():
                file = tar.extractfile(member)
                assert file is not None, member.name
                parts[ending] = file.read()
            yield key, wrong_sample(key, parts, inputs, media)
