"""Flags of the source of samples. Imports no reader, so that the command line starts fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from megatron_mimo.settings import File, Folder, Number, OnlyWith, Switch, Within, named
from megatron_mimo.settings.ranges import MOST_POSITIONS, MOST_SAMPLES

_MOCK = OnlyWith("--dataset-provider mock")
_ENERGON = OnlyWith("--dataset-provider energon")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Source of the samples.

    Attributes:
        provider: Source of samples: "mock" makes them up, "energon" reads a dataset from
            --data-path.
        path: Energon dataset folder, JSON Lines file, or metadataset YAML.
        media_root: Energon: folder outside of the dataset whose files samples may name by path;
            give it once for each.
        num_workers: Energon: number of workers per lane, each with a separate share of its samples
            in a separate order; 0 is one, which reads in the training process.
        loader_processes: Energon: number of processes per rank that do the work of its lanes'
            workers; any number gives the same samples; left out: one less than the rank has cores.
        shuffle_buffer_size: Energon: number of samples among which the next training sample is
            drawn.
        packing_buffer_size: Energon: number of samples among which those that share a sequence are
            chosen; left out: each has a separate sequence.
        max_samples_per_sequence: Energon: number of consecutive training samples that are read from
            a shard before another place is read.
        max_bad_sample_fraction: Energon: fraction of a lane's samples that may be broken, too long
            or without an answer, 0 to 1; more stop the run.
        validate_alignment: Whether to check in each step that all modules read the same samples.
        trust_dataset_code: Whether to run Python that a dataset's files name, such as a sample
            loader; only for datasets whose author you trust.
        sample_trace_dir: Folder to write the sample keys of every step to, one file per rank.
        mock_dataset_size: Number of distinct mock samples, after which they repeat.
        mock_image_rows: Number of rows, and so of image tokens, of every mock image; left out: any
            number.
        text_only_fraction: Fraction of the mock samples that have no image, 0 to 1.
    """

    provider: Annotated[Literal["mock", "energon"], named("--dataset-provider")] = "mock"
    path: Annotated[File, named("--data-path"), _ENERGON] = None
    media_root: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR"), _ENERGON] = ()
    num_workers: Annotated[int, Within(0, 4096), _ENERGON] = 0
    loader_processes: Annotated[Number, Within(0, 4096), _ENERGON] = None
    shuffle_buffer_size: Annotated[int, Within(0, 100_000_000), _ENERGON] = 100
    packing_buffer_size: Annotated[Number, Within(1, 1_000_000), _ENERGON] = None
    max_samples_per_sequence: Annotated[int, Within(1, MOST_SAMPLES), _ENERGON] = 100
    max_bad_sample_fraction: Annotated[float, Within(0, 1), _ENERGON] = 0.05
    validate_alignment: Annotated[bool, named("--validate-data-alignment")] = True
    trust_dataset_code: Annotated[Switch, _ENERGON] = False
    sample_trace_dir: Folder = None
    mock_dataset_size: Annotated[int, Within(1, MOST_SAMPLES), _MOCK] = 1_000_000
    mock_image_rows: Annotated[
        Number, named("--image-seq-length"), Within(1, MOST_POSITIONS), _MOCK
    ] = None
    text_only_fraction: Annotated[float, Within(0, 1), _MOCK] = 0.0
