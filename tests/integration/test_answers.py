"""Answers: those of transformers, of a full computation for each token, and of every layout."""

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.slices import slow_but
from tests.integration.asked import pictures, recomputed, save, write_folder

EXAMPLES = Path(__file__).parents[2] / "examples/mimo"
QUESTION = "Which colour is this?"
COUNT = 12
SMALL = [
    *("--override", "language.hidden_size=64", "--override", "vision.hidden_size=64"),
    *("--init", "topology-invariant", "--seed", "5", "--seq-length", "64"),
]
HYBRID = ["--model-provider", "nemotron-moe-vlm-tiny", *SMALL]
DENSE = ["--model-provider", "mock", *SMALL]
# Ranks, and flags of the layout.
LAYOUTS: dict[str, tuple[int, list[str], list[str]]] = {
    "hybrid, all at once": (
        8,
        HYBRID,
        "--encoder-pp 2 --encoder-tp 2 --llm-dp 2 --llm-tp 2 --llm-ep 2".split(),
    ),
    "hybrid, stages": (4, HYBRID, ["--encoder-dp", "2", "--llm-pp", "2"]),
    "dense, stages and context": (
        6,
        DENSE,
        ["--encoder-dp", "2", "--llm-pp", "2", "--llm-cp", "2"],
    ),
    "dense, tensor": (3, DENSE, ["--llm-tp", "2"]),
}  # fmt: skip


def against_transformers(folder: Path) -> dict[str, Any]:
    """Greedy tokens of ours, of a full computation for each, and of transformers."""
    import torch

    import megatron_mimo
    from megatron_mimo.data import Turn
    from megatron_mimo.data.samples.question import Source, encode_question

    peer = write_folder(folder)
    model = megatron_mimo.load(folder, device="cpu")
    images = pictures()
    turns = [Turn("user", f"<image>{QUESTION}<image>")]
    given = {"encoder": [Source(str(i), image) for i, image in enumerate(images)]}
    encoded = encode_question(turns, given, model.run.data, model.run.tokenizer)
    size, vision = 4, peer.config.vision_config
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (vision.norm_mean, vision.norm_std))
    pixels = [(torch.from_numpy(i).permute(2, 0, 1) / 255 - mean) / std for i in images]
    ids = torch.from_numpy(encoded.tokens)[None]
    theirs = peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat(
            [torch.nn.functional.unfold(p[None], size, stride=size)[0].T for p in pixels]
        ),
        image_grid_hw=torch.tensor([[p.shape[1] // size, p.shape[2] // size] for p in pixels]),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=sorted(model.ends),
    )[0, len(encoded.tokens) :].tolist()
    answer = model.generate(turns, images, max_new_tokens=COUNT)
    other = model.generate(turns, [255 - image for image in images], max_new_tokens=COUNT)
    return {
        "ours": answer,
        "other": other,
        "theirs": theirs,
        "recomputed": recomputed(model, encoded, COUNT),
        "ends": model.ends,
    }


def test_greedy_answers_are_those_of_transformers(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    (found,) = run_ranks(1, against_transformers, tmp_path / "model", timeout=120)
    tokens = list(found["ours"].tokens)
    assert tokens == [token for token in found["theirs"] if token not in found["ends"]]
    assert tokens == found["recomputed"][: len(tokens)]
    assert len(set(tokens)) > 2
    # The images are seen.
    assert found["other"].tokens != found["ours"].tokens


def answers(folder: str) -> dict[str, Any]:
    """What a saved run answers, greedily and at random, and with everything computed again."""
    import megatron_mimo
    from megatron_mimo.data.samples.question import encode_question

    model = megatron_mimo.load(folder, device="cpu")
    images = pictures()
    greedy = model.generate(QUESTION, images, max_new_tokens=COUNT)
    given = model._given(images, {})
    sources, turns = model._read(given), model._turns(QUESTION, given)
    encoded = encode_question(turns, sources, model.run.data, model.run.tokenizer)
    sampled = {"max_new_tokens": COUNT, "temperature": 1.0, "top_p": 0.9}
    draws = [model.generate(QUESTION, images, seed=seed, **sampled) for seed in (1, 1, 2)]
    stream = model.stream(QUESTION, images, seed=1, **sampled)
    return {
        "greedy": greedy.tokens,
        "recomputed": recomputed(model, encoded, COUNT),
        "draws": [draw.tokens for draw in draws],
        "text": draws[0].text,
        "pieces": list(stream),
        "iteration": model.run.iteration,
    }


@pytest.fixture(scope="module")
def saved(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank: "hybrid" and "dense"."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(1, save, HYBRID, str(root / "hybrid"))
    run_ranks(1, save, DENSE, str(root / "dense"))
    return root


@pytest.mark.parametrize("name", ["hybrid", "dense"])
def test_what_layers_keep_changes_no_answer(
    name: str, run_ranks: Callable[..., list], saved: Path
) -> None:
    (found,) = run_ranks(1, answers, str(saved / name))
    greedy = list(found["greedy"])
    assert greedy == found["recomputed"][: len(greedy)] and len(greedy) > 2
    first, again, other = found["draws"]
    assert first == again != other
    assert "".join(found["pieces"]) == found["text"]
    assert found["iteration"] == 3


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "hybrid, stages"))
def test_every_layout_answers_alike(
    name: str, run_ranks: Callable[..., list], saved: Path, tmp_path: Path
) -> None:
    ranks, model, layout = LAYOUTS[name]
    run_ranks(ranks, save, [*model, *layout], str(tmp_path / "run"), timeout=120)
    (found,) = run_ranks(1, answers, str(tmp_path / "run"))
    (wanted,) = run_ranks(1, answers, str(saved / name.partition(",")[0]))
    assert found["greedy"] == wanted["greedy"]


def commands(run: str, folder: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of some commands."""
    from PIL import Image

    from megatron_mimo.cli import main

    image, questions = f"{folder}/a.png", Path(folder) / "asked.jsonl"
    Image.fromarray(pictures()[0]).save(image)
    lines = [{"question": QUESTION, "image": "a.png", "id": 7}, {"question": "And now?"}]
    questions.write_text("\n\n".join(map(json.dumps, lines)))
    (Path(folder) / "broken.png").write_bytes(Path(image).read_bytes()[:60])
    found, sampling = [], ["--device", "cpu", "--max-new-tokens", "6"]
    for argv in (
        [run, QUESTION, "--image", image, "--image", image, *sampling],
        [run, QUESTION, "--image", image, "--image", image, "--json", *sampling],
        [run, "--questions", str(questions), *sampling],
        [run, QUESTION, "--image", f"{folder}/broken.png", *sampling],
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", *argv])
        found.append((code, out.getvalue(), err.getvalue()))
    return found


def test_the_command_answers(run_ranks: Callable[..., list], saved: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, commands, str(saved / "dense"), str(tmp_path), timeout=120)
    plain, as_json, asked, broken = found
    assert plain[0] == as_json[0] == asked[0] == 0, found
    line = json.loads(as_json[1])
    assert plain[1] == f"{line['answer']}\n"
    assert line["question"] == QUESTION and len(line["images"]) == 2
    assert line["stopped"] == "length" and line["new_tokens"] == 6
    first, second = map(json.loads, asked[1].splitlines())
    assert first["id"] == 7 and second["question"] == "And now?"
    assert first["prompt_tokens"] > second["prompt_tokens"] == len("And now?\n")
    assert broken[0] == 2 and broken[1] == ""
    assert broken[2].startswith(f"error: {tmp_path}/broken.png cannot be used: ")
    assert len(broken[2].splitlines()) == 1


def talked(run: str, folder: str) -> tuple[list[str], list[Any]]:
    """What a conversation prints, line by line, and the history at its end."""
    from PIL import Image

    from megatron_mimo.inference import load
    from megatron_mimo.inference.sampling import Sampling
    from megatron_mimo.tools.chat.command import Conversation
    from megatron_mimo.tools.generate.config import ChatConfig

    image = f"{folder}/a.png"
    Image.fromarray(pictures()[0]).save(image)
    said: list[str] = []
    config = ChatConfig(sampling=Sampling(max_new_tokens=4))
    talk = Conversation(load(run, device="cpu"), config, said.append)
    goes_on = [
        talk.take(line)
        for line in (
            f"/image {image}", QUESTION, "And that?", "/picture", "/image", "/image nowhere.png",
            "<image> without one", "",
        )
    ]  # fmt: skip
    history = list(talk.history.turns)
    goes_on += [talk.take("/reset"), talk.take("Hello"), talk.take("/exit")]
    return "".join(said).splitlines(), [
        history,
        len(talk.history.turns),
        len(talk.history.images),
        goes_on,
    ]


def test_a_chat_keeps_its_history(
    run_ranks: Callable[..., list], saved: Path, tmp_path: Path
) -> None:
    ((said, state),) = run_ranks(1, talked, str(saved / "dense"), str(tmp_path))
    history, turns, images, goes_on = state
    assert [turn.role for turn in history] == ["user", "assistant"] * 2
    assert history[0].text == f"<image>{QUESTION}" and history[2].text == "And that?"
    assert (turns, images) == (2, 0)
    assert goes_on == [True] * 10 + [False]
    text = "\n".join(said)
    assert "/picture is not known: expected /image, /reset, /exit, /help, or a question" in text
    assert "/image without a path" in text and "nowhere.png is not there" in text
    assert "error: the question has 1 <image> and 0 images" in text


READINGS = "examples.mimo.readings"


def outside(folder: str) -> list[Any]:
    """Answers about readings, and about other ones; and what is refused."""
    import numpy as np

    import megatron_mimo

    model = megatron_mimo.load(folder, device="cpu", custom_import=[READINGS])
    random, files = np.random.default_rng(1), []
    for number in range(2):
        files.append(f"{folder}/{number}.npy")
        np.save(files[-1], random.normal(size=(20, 4)).astype(np.float32) * 3)
    image, found = pictures()[0], []
    for file in files:
        items = {"readings": [file]}
        found.append(model.generate(QUESTION, [image], items=items, max_new_tokens=8).tokens)
    for items in ({"readings": [b"none"]}, {"sounds": [b""]}):
        with pytest.raises(ValueError) as caught:
            model.generate(QUESTION, items=items)
        found.append(str(caught.value))
    return found


@pytest.mark.slow
def test_modules_from_outside_take_their_items(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    flags = ["--custom-import", READINGS, "--model-provider", "mock-readings", "--seq-length", "96"]
    run_ranks(1, save, [*flags, "--init", "topology-invariant"], str(tmp_path / "run"))
    (found,) = run_ranks(1, outside, str(tmp_path / "run"))
    first, other, broken, unknown = found
    assert first != other and len(first) > 2
    assert broken.startswith("reading 1 cannot be used: ")
    assert unknown == "items of module 'sounds': this model has encoder, readings"


@pytest.mark.slow
def test_the_notebook_runs(saved: Path, tmp_path: Path) -> None:
    from PIL import Image

    notebook = json.loads((EXAMPLES / "ask.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "outputs are not kept in the repository"
    here = tmp_path / "examples/mimo"
    here.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    shutil.copytree(saved / "dense", tmp_path / "runs/demo")
    Image.fromarray(pictures()[0]).save(tmp_path / "runs/demo/example.png")
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join("".join(cell["source"]) for cell in cells)],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("0 ")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, argv: list[str]) -> None:
        ours, theirs = pty.openpty()
        self._ours, self.shown = ours, ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mimo.cli", *argv],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(theirs)

    def wait_for(self, text: str, count: int = 1, timeout_s: float = 120) -> None:
        """Read until a text has been shown so many times."""
        end = time.monotonic() + timeout_s
        while self.shown.count(text) < count:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self._ours, 4096).decode(errors="replace")

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def exit_code(self) -> int:
        """The exit code; what is shown at the end is read first."""
        with contextlib.suppress(OSError):  # The terminal is gone.
            while piece := os.read(self._ours, 4096):
                self.shown += piece.decode(errors="replace")
        return self._process.wait(timeout=60)

    def close(self) -> None:
        """End the command if it still runs, and the terminal."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "code"), [("\x04", 0), ("/exit\n", 0), ("\x03", 130)], ids=["eof", "exit", "ctrl-c"]
)
def test_a_terminal_talks_and_is_left_quietly(last: str, code: int, saved: Path) -> None:
    argv = ["chat", str(saved / "dense"), "--device", "cpu", "--max-new-tokens", "3"]
    terminal = Terminal(argv)
    try:
        terminal.wait_for("\n> ")
        assert terminal.shown.startswith(f"loading {saved}/dense\r\n/help lists commands"), (
            terminal.shown
        )
        terminal.type("Hello\n")
        terminal.wait_for("\n> ", 2)
        terminal.type(last)
        assert terminal.exit_code() == code, terminal.shown
        assert "Traceback" not in terminal.shown and "Interrupt" not in terminal.shown
    finally:
        terminal.close()
