"""What the scripts say of themselves: their headers, flags and the table of README.md."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import Resolved, resolve
from tests.hf.published import save_published

SCRIPTS = Path(__file__).parents[3] / "scripts"
HF = sorted(SCRIPTS.glob("hf_*.sbatch"))
"""Scripts of models of transformers."""
BATCH = sorted(
    set(SCRIPTS.glob("*.sbatch")) - set(HF),
    # By name where lengths are equal: workers must find tests in one order.
    key=lambda path: (path.stem.split("_")[0], len(path.stem), path.stem),
)
LOCAL = [SCRIPTS / "local_cpu.sh", SCRIPTS / "local_8gpu.sh"]

# Prints what it is given instead of starting anything.
_ECHO = '#!/bin/bash\nprintf "%s\\0" "$NCCL_PROTO" "$MIMO_FIRST_WEIGHTS" "${@:2}"\n'


@dataclass(frozen=True, slots=True)
class Recipe:
    """A script.

    Attributes:
        path: Of the script.
        header: Its #SBATCH options; a switch has "".
        purpose: Its "# Purpose:" line.
        nccl_proto: What it exports.
        flags: What it hands to the launcher.
        ranks: How many it starts.
    """

    path: Path
    header: dict[str, str]
    purpose: str
    nccl_proto: str
    flags: tuple[str, ...]
    ranks: int

    @property
    def nodes(self) -> int:
        return int(self.header.get("nodes", 1))

    def resolve(self, *more: str) -> Resolved:
        """With the real parser and resolver, at the real number of ranks."""
        line = parse([*self.flags, "--save", "/runs/a", *more], CommandLine, prog="train")
        return resolve(line.train, self.ranks)


def read_recipe(path: Path, folder: Path) -> Recipe:
    """Run a script on a launcher that prints.

    Args:
        path: The script.
        folder: For the launcher, and for the folder of a model of transformers.
    """
    model = folder / "models" / path.stem
    if path in HF and not model.exists():
        save_published(published_name(path), model)
    root = folder / "root"
    (root / "scripts").mkdir(parents=True, exist_ok=True)
    (root / "scripts" / "launch.sh").write_text(_ECHO)
    text = path.read_text()
    copy = root / "scripts" / path.name
    copy.write_text(text)
    env = {
        "PATH": os.environ["PATH"],
        "MIMO_ROOT": str(root),
        "MIMO_DATA_PATH": "/data",
        "MIMO_TOKENIZER": "/tokenizer",
        "MIMO_HF_FOLDER": str(model),
    }
    if path.suffix == ".sbatch" and "MIMO_FIRST_WEIGHTS:?" in text:
        env["MIMO_FIRST_WEIGHTS"] = "nemotron:/weights"
    done = subprocess.run(
        ["bash", str(copy)], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    proto, _, *flags = done.stdout.rstrip("\0").split("\0")
    header = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    local = re.search(r"^export MIMO_LOCAL_RANKS=(\d+)$", text, re.MULTILINE)
    ranks = int(local[1]) if local else int(header["nodes"]) * int(header["ntasks-per-node"])
    purpose = re.search(r"^# Purpose: (.*)\.$", text, re.MULTILINE)
    assert purpose, f"{path.name} has no line '# Purpose: ….'"
    return Recipe(path, header, purpose[1], proto, tuple(flags), ranks)


def published_name(path: Path) -> str:
    """Name in `tests.hf.published` of the model of a script: gemma4-31b of hf_gemma4_31b_4n."""
    return "-".join(path.stem.split("_")[1:-1])


def table(recipes: list[Recipe]) -> str:
    """The table of README.md, from what the flags resolve to."""
    lines = [
        "| script | nodes (encoder + LLM) | ranks | encoder | LLM | lanes per encoder rank | GBS "
        "| microbatches | iterations | purpose |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in sorted(
        recipes, key=lambda recipe: (recipe.path.suffix != ".sbatch", recipe.ranks)
    ):
        lines.append(_row(recipe))
    return "\n".join(lines)


def _row(recipe: Recipe) -> str:
    resolved = recipe.resolve()
    layout = resolved.layout
    encoder, llm = layout.modules.get("encoder"), layout.target
    assert encoder is not None
    nodes = "1"
    if recipe.path.suffix == ".sbatch":
        per_node = int(recipe.header["ntasks-per-node"])
        # A node holds ranks of one module only, or every rank holds both.
        assert not len(encoder.ranks) % per_node and not len(llm.ranks) % per_node
        both = encoder.ranks == llm.ranks
        parts = f"{len(encoder.ranks) // per_node} + {len(llm.ranks) // per_node}"
        nodes = f"{recipe.nodes} ({'both on each' if both else parts})"
    stages = "" if llm.pp == 1 else f"PP {llm.pp}, "
    cells = [
        f"`{recipe.path.name}`",
        nodes,
        str(recipe.ranks),
        f"TP {encoder.tp}, DP {encoder.dp}",
        f"TP {llm.tp}, {stages}DP {llm.dp}, EP {llm.ep}, expert DP {llm.expt_dp}",
        f"{layout.num_lanes / encoder.dp:g}",
        str(resolved.global_batch_size),
        str(resolved.data.num_microbatches(layout.num_lanes)),
        f"{resolved.train_iters:,}",
        recipe.purpose,
    ]
    return f"| {' | '.join(cells)} |"
