"""Draw inspect.png: the page of `megatron-mimo data inspect` for a few digits, with a browser.

Usage: python docs/images/draw_inspect.py [chromium]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from megatron_mimo.cli import main as run
from megatron_mimo.data.reading.webdataset import read_shard
from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset

_WIDTH, _HEIGHT = 1000, 2000
_COLOURS = 32


def main(browser: str) -> None:
    """Write the picture beside this file.

    Args:
        browser: Program that takes chromium's flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _write_samples(work)
        talk, data, page = work / "talk.jsonl", work / "data" / "talk", work / "inspect.html"
        assert run(["data", "prepare", str(talk), "--out", str(data)]) == 0
        flags = ["--model-provider", "nemotron-moe-vlm-tiny", "--seq-length", "128"]
        flags += ["--packing-buffer-size", "100", "--out", str(page)]
        assert run(["data", "inspect", str(data), *flags]) == 0
        # The folder's name says nothing to a reader.
        page.write_text(page.read_text().replace(f"{work}/", ""))
        shot = work / "shot.png"
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--screenshot={shot}", f"--window-size={_WIDTH},{_HEIGHT}", page.as_uri()),
            ],
            check=True,
            timeout=120,
        )
        picture = Image.open(shot).convert("RGB").quantize(_COLOURS)
        picture.save(Path(__file__).with_name("inspect.png"), optimize=True)


def _write_samples(work: Path) -> None:
    """A JSONL file of questions about digits, and of notes, with the images beside it."""
    config = DigitsConfig(num_train=300, num_val=1, single_fraction=0.3)
    digits = write_digits_dataset(work / "digits", config)
    lines = []
    for key, parts in read_shard(digits / "train" / "000000.tar").items():
        (work / f"{key}.png").write_bytes(parts["png"])
        sample = json.loads(parts["json"])
        asked = [{"from": "human", "value": sample["question"]}]
        asked.append({"from": "gpt", "value": sample["answer"]})
        lines.append({"image": f"{key}.png", "conversations": asked})
        if len(lines) % 5 == 0:
            lines.append({"text": f"Digits are written by hand, here {len(lines)} of them."})
    (work / "talk.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "chromium")
