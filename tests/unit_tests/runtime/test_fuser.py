"""How often megatron-core's small functions are compiled while numbers of tokens change.

The layers are those of a host, compiled as on a GPU but by torch's tracer alone: it decides when to
compile again, whatever compiles.
"""

import json
import os
import subprocess
import sys

import pytest

# Images, and sequence lengths, of one microbatch after the other; no two have the same number.
GRIDS = ([(4, 4), (2, 6)], [(2, 2)], [(6, 4), (4, 4), (2, 2)], [(8, 8)], [(2, 6), (2, 6)])
LENGTHS = (24, 17, 40, 33, 5)

SCRIPT = """
import json, sys
from contextlib import contextmanager
from functools import partial
import torch
from torch._dynamo.utils import counters

ours, grids, lengths = json.loads(sys.argv[1])
torch.compile = partial(torch.compile, backend="eager")
from megatron_mimo.runtime import fuser, initialize
from megatron_mimo.runtime.host import megatron_core

@contextmanager
def as_it_comes():
    yield

megatron_core._uncompiled = fuser.fuser_of_any_number if ours else as_it_comes
initialize("cpu")
from tests.unit_tests.modules.test_fused_adapters import build, fill

def count():
    return counters["stats"]["unique_graphs"]

def module(preset):
    built = build(preset, "float32")
    fill(built)
    for layer in built.modules():
        if hasattr(layer, "config"):
            layer.config.bias_dropout_fusion = True
    return built

encoder, found = module("radio"), {"encoder": [], "language": []}
from megatron_mimo.media.images.packing import pack_patches
settings = encoder.architecture.vision
for sizes in grids:
    number = sum(height * width for height, width in sizes)
    patches = torch.randn(number, 3 * settings.patch_dim**2)
    encoder(pack_patches(patches, sizes, settings.image_config())).sum().backward()
    found["encoder"].append(count())
language = module("hybrid")
for length in lengths:
    tokens = torch.randint(0, 96, (1, length))
    language(tokens, torch.arange(length)[None], None, None, None, tokens).sum().backward()
    found["language"].append(count())
print(json.dumps(found))
"""


def compiled(*, ours: bool) -> dict[str, list[int]]:
    """Versions of functions that were compiled, after each microbatch of each module."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps([ours, GRIDS, LENGTHS])],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_encoder_compiles_in_its_first_microbatch_only() -> None:
    found = compiled(ours=True)
    assert 0 < found["encoder"][0] == found["encoder"][-1]
    # An expert may get no token or a single one, which are compiled by themselves.
    assert found["language"][-1] - found["language"][0] <= 2


@pytest.mark.slow
def test_without_it_the_next_microbatch_compiles_again() -> None:
    """The fault that is mended; when torch no longer has it, `runtime.fuser` can go."""
    found = compiled(ours=False)
    assert found["encoder"][-1] > found["encoder"][0]
