"""Draw report.png: three sections of the report of a short run, with a browser.

Usage: python docs/images/draw_report.py [chromium]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from megatron_mimo.cli import main as run
from megatron_mimo.tools.report.command import run_sections, write_run_page

_WIDTH, _HEIGHT = 1400, 1480
_COLOURS = 200
_SECTIONS = ("Curves", "Where the time of a step goes", "Timeline")
# An encoder rank and a language model of three stages, eight microbatches.
_RUN = """
    --nproc 4 --encoder-dp 1 --llm-pp 3 --model-provider nemotron-moe-vlm-tiny
    --override language.pattern=M*EM*EM*EM*E --global-batch-size 32 --micro-batch-size 4
    --train-iters 60 --log-interval 2 --eval-interval 10 --eval-iters 1 --lr 2e-3
    --lr-warmup-iters 10 --lr-decay-style cosine --seq-length 128
    --timeline-profile --timeline-ranks all --profile-step-start 40 --profile-step-end 41
""".split()


def main(browser: str) -> None:
    """Write the picture beside this file.

    Args:
        browser: Program that takes chromium's flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        assert run(["train", *_RUN, "--tensorboard-dir", str(work / "run")]) == 0
        page, shot = work / "report.html", work / "shot.png"
        sections = [
            # The folder's name says nothing to a reader.
            (name, body.replace(f"{work}/", ""))
            for name, body in run_sections(work / "run")
            if name in _SECTIONS
        ]
        write_run_page(page, title="runs/a", lead="", parts=sections)
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--virtual-time-budget=20000", f"--user-data-dir={work / 'profile'}"),
                *(f"--screenshot={shot}", f"--window-size={_WIDTH},{_HEIGHT}", page.as_uri()),
            ],
            check=True,
            timeout=120,
        )
        picture = Image.open(shot).convert("RGB").quantize(_COLOURS)
        picture.save(Path(__file__).with_name("report.png"), optimize=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "chromium")
