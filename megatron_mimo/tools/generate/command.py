"""`megatron-mimo generate`: a question, or a file of them, to a trained model."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mimo.border import printable
from megatron_mimo.tools.generate.config import GenerateConfig, ModelFlags
from megatron_mimo.tools.generate.questions import Question, read_questions

if TYPE_CHECKING:
    from megatron_mimo.inference import Answer, LoadedModel, Sampling


def run_generate(run: str, question: str | None, config: GenerateConfig) -> int:
    """Answer, and print the answers.

    Args:
        run: Folder of the run, or of a model.
        question: The question; None where a file has them.
        config: Values of the flags.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: There is no question or there are two, or something that the flags name is not
            there or damaged; the message names it.
    """
    if (question is None) == (config.questions is None):
        raise ValueError(
            "expected either a QUESTION after RUN, or --questions FILE"
            f"{'' if question is None else ', got both'}"
        )
    given = {"image": config.image, "video": config.video, "audio": config.audio}
    if config.questions is not None:
        for noun, files in given.items():
            if files:
                raise ValueError(
                    f"--{noun} {files[0]} with --questions: name {noun}s in the file, a field "
                    f"{noun} or {noun}s of each line"
                )
    # Before the model is loaded, which takes a while.
    asked = [] if config.questions is None else read_questions(Path(config.questions))
    _require_files(asked, given)
    model = open_model(run, config.model)
    if question is not None:
        _answer_one(model, question, given, config)
    for one in asked:
        _answer_line(model, one, config.sampling)
    return 0


def open_model(run: str, flags: ModelFlags) -> "LoadedModel":
    """Load the model that flags name.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    if sys.stderr.isatty():
        # Imports and weights take a few seconds.
        sys.stderr.write(f"loading {printable(run)}\n")
    from megatron_mimo.inference import load

    return load(
        run,
        device=flags.device,
        tokenizer_model=flags.tokenizer_model,
        custom_import=flags.custom_import,
        trust_checkpoint=flags.trust_checkpoint,
    )


def fields_of(sampling: "Sampling") -> dict[str, Any]:
    """The fields of a `Sampling`, as `LoadedModel.stream` takes them."""
    return dataclasses.asdict(sampling)


def _answer_one(
    model: "LoadedModel",
    question: str,
    given: Mapping[str, Sequence[str]],
    config: GenerateConfig,
) -> None:
    """Print the answer as it is written, or JSON when it is complete."""
    stream = model.stream(question, items=_by_kind(model, given), **fields_of(config.sampling))
    for piece in stream:
        if not config.json:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    if config.json:
        files = {f"{noun}s": list(named) for noun, named in given.items()}
        others = {name: named for name, named in files.items() if named and name != "images"}
        _print_json({"question": question, "images": files["images"], **others}, stream.answer)
    else:
        sys.stdout.write("\n")


def _answer_line(model: "LoadedModel", question: Question, sampling: "Sampling") -> None:
    try:
        items = _by_kind(model, question.files)
        answer = model.generate(question.text, items=items, **fields_of(sampling))
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}") from error
    _print_json(question.fields, answer)


def _by_kind(
    model: "LoadedModel", files: Mapping[str, Sequence[str | Path]]
) -> dict[str, Sequence[str | Path]]:
    """Files by the kinds of the model's items, from those by noun.

    Raises:
        ValueError: The model takes no such items.
    """
    return {model.kind_of(noun): named for noun, named in files.items() if named}


def _print_json(asked: Mapping[str, Any], answer: "Answer") -> None:
    """One line: what was asked, the answer, and what it took."""
    speed = len(answer.tokens) / answer.seconds if answer.seconds else 0.0
    line = {
        **asked,
        "answer": answer.text,
        "stopped": answer.stopped,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.tokens),
        "tokens_per_second": round(speed, 2),
    }
    sys.stdout.write(f"{printable(json.dumps(line, ensure_ascii=False))}\n")
    sys.stdout.flush()


def _require_files(asked: Sequence[Question], given: Mapping[str, Sequence[str]]) -> None:
    """Refuse files that are not there before a model is loaded, and questions are answered."""
    named = [(f"--{noun}", noun, Path(file)) for noun, files in given.items() for file in files]
    named += [
        (f"{one.where}: {noun}", noun, file)
        for one in asked
        for noun, files in one.files.items()
        for file in files
    ]
    for what, noun, path in named:
        if not path.is_file():
            wrong = "is not a file" if path.exists() else "is not there"
            article = "a" if noun == "video" else "an"
            raise ValueError(f"{what} {path} {wrong}: expected {article} {noun} file")
