"""A trained model that answers questions: `load`, `LoadedModel.generate`, `LoadedModel.stream`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from megatron_mimo.data import Turn
from megatron_mimo.data.inputs import module_of
from megatron_mimo.data.loader.collate import collate_facts
from megatron_mimo.data.samples.question import (
    EncodedQuestion,
    Source,
    encode_question,
    place_items,
)
from megatron_mimo.data.text.question import answer_ends
from megatron_mimo.inference.pieces import Pieces
from megatron_mimo.inference.run import Run, read_run
from megatron_mimo.inference.sampling import Sampling, choose
from megatron_mimo.inference.sources import read_source, require_several
from megatron_mimo.inference.video_sampling import retained
from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.model.hf import HfFolder
from megatron_mimo.model.omni.config import OmniConfig
from megatron_mimo.runtime import prepare_megatron_core, resolve_device
from megatron_mimo.runtime.staging import map_tensors

if TYPE_CHECKING:
    from megatron_mimo.modules.hf.decoding import HfDecoding
    from megatron_mimo.modules.language.decoding import Decoding
    from megatron_mimo.modules.stage import ModuleStage

IMAGE = "image"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Answer to one question.

    Attributes:
        text: Its text.
        tokens: Numbers of its tokens, without the one that ends it.
        prompt_tokens: Number of tokens of the question, rows of its items included.
        stopped: Why it ends: "end" where the model ended it, "length" after `max_new_tokens`, and
            "left" where whoever read the stream has closed it.
        seconds: Time from the encoded question to the last token, in seconds.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: Literal["end", "length", "left"]
    seconds: float


class LoadedModel:
    """A trained model in this process; `load` makes one. Not for several threads at once.

    Attributes:
        run: What its run, or folder, says of it.
        device: Device of its weights.
    """

    def __init__(
        self, run: Run, modules: "Mapping[str, ModuleStage]", device: torch.device
    ) -> None:
        self.run = run
        self.device = device
        self._modules = {name: module.to(device) for name, module in modules.items()}
        self._ends = answer_ends(run.data, run.tokenizer)
        if isinstance(run.resolved.folder, HfFolder):
            self._ends |= set(run.resolved.folder.ends)

    def generate(
        self,
        question: str | Sequence[Turn],
        images: Sequence[Any] = (),
        *,
        items: Mapping[str, Sequence[Any]] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer a question; arguments and errors are those of `stream`."""
        stream = self.stream(question, images, items=items, **sampling)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        question: str | Sequence[Turn],
        images: Sequence[Any] = (),
        *,
        items: Mapping[str, Sequence[Any]] | None = None,
        **sampling: Any,
    ) -> "Stream":
        """Answer a question piece by piece.

        Args:
            question: Text of the question; or the turns of a conversation that ends with one. It
                has a placeholder for each item, such as <image>; without any, those of a text are
                put in front of it.
            images: Images: paths to files, contents of files (bytes), PIL images, or pixels, uint8
                [H, W, 3]; in the order of their placeholders.
            items: Kind -> its items, as `kind_of` names it, for others than images.
            sampling: Fields of `Sampling`, such as `temperature` and `max_new_tokens`.

        Returns:
            Iterator over pieces of the answer's text; `answer` is the whole of it.

        Raises:
            ValueError: A file is not there, an item is damaged (the message names it), placeholders
                and items differ in number, or a field of `Sampling` is out of bounds.
        """
        chosen = Sampling(**sampling)
        given = self._given(images, items or {})
        sources = self._read(given)
        turns = self._turns(question, given)
        encoded = encode_question(turns, sources, self.run.data, self.run.tokenizer)
        return Stream(self, encoded, chosen)

    def with_placeholders(
        self, question: str, images: Sequence[Any] = (), *, items: Mapping[str, Any] | None = None
    ) -> str:
        """The question with a placeholder for each item, as `stream` puts them in front."""
        return self._placed(question, self._given(images, items or {}))

    def _placed(self, question: str, given: Mapping[str, Sequence[Any]]) -> str:
        numbers = {module: len(of_module) for module, of_module in given.items()}
        return place_items(question, numbers, self.run.data.inputs)

    def _turns(
        self, question: str | Sequence[Turn], given: Mapping[str, Sequence[Any]]
    ) -> list[Turn]:
        if isinstance(question, str):
            return [Turn("user", self._placed(question, given))]
        turns = list(question)
        if not turns or turns[-1].role == "assistant":
            raise ValueError(
                f"a conversation of {len(turns)} turns that ends with "
                f"{'an answer' if turns else 'nothing'}: expected a question at its end"
            )
        return turns

    def _given(
        self, images: Sequence[Any], items: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """Items by kind, as they were given."""
        given = {name: require_several(sources, name) for name, sources in items.items()}
        if pictures := require_several(images, "images"):
            given.setdefault(self.kind_of(IMAGE), []).extend(pictures)
        known = [name for name in self.run.data.inputs if self._takes(name)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"items of module {name!r}: this model has "
                    f"{', '.join(known) or 'none that takes items'}"
                )
        return given

    def _takes(self, name: str) -> bool:
        """Whether a module of this model takes the items of a kind."""
        return module_of(name, self.run.data.inputs) in self._modules

    def _read(self, given: Mapping[str, Sequence[Any]]) -> dict[str, list[Source]]:
        """Items by kind, read from their files."""
        return {
            module: [
                read_source(source, f"{self.run.data.inputs[module].words.noun} {number}")
                for number, source in enumerate(sources, 1)
            ]
            for module, sources in given.items()
        }

    def kind_of(self, noun: str) -> str:
        """Name of the kind of items that are called so, such as "image", "video" or "audio".

        Raises:
            ValueError: The model takes no such items; names those that it takes.
        """
        nouns = []
        for name, kind in self.run.data.inputs.items():
            if self._takes(name):
                nouns.append(kind.words.plural)
                if kind.words.noun == noun:
                    return name
        raise ValueError(
            f"this model takes no {noun}s: ask without"
            f"{f', or with {", ".join(nouns)}' if nouns else ''}"
        )

    @torch.inference_mode()
    def rows(self, encoded: EncodedQuestion) -> tuple[Tensor | None, Tensor | None]:
        """Rows of all items [R, H], in the model's dtype, and positions, int64 [R]; or None."""
        return self._joined(*self._rows_by_module(encoded))

    @torch.inference_mode()
    def read(self, encoded: EncodedQuestion) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the language model reads of a question: tokens, rows and their positions.

        Rows of videos that the model's folder leaves out (`video_pruning_rate`) are not among them.

        Returns:
            Tokens, int64 [n]; rows [R, H] in the model's dtype, and positions, int64 [R], or None.
        """
        rows, places = self._rows_by_module(encoded)
        tokens = torch.from_numpy(encoded.tokens)
        folder = self.run.resolved.folder
        rate = folder.video_pruning_rate if isinstance(folder, OmniConfig) else 0.0
        if rate:
            keep = torch.ones(len(tokens), dtype=torch.bool)
            for module, items in encoded.items.items():
                start = 0
                for item in items:
                    if isinstance(item, EncodedVideo):
                        of_item = slice(start, start + item.rows)
                        by_group = rows[module][of_item].unflatten(0, (len(item.labels), -1))
                        keep[places[module][of_item]] = retained(by_group, rate).flatten().cpu()
                    start += item.rows
            moved = keep.cumsum(0) - 1
            for module, at in places.items():
                kept = keep[at]
                rows[module] = rows[module][kept.to(self.device)]
                places[module] = moved[at[kept]]
            tokens = tokens[keep]
        return tokens, *self._joined(rows, places)

    def _rows_by_module(
        self, encoded: EncodedQuestion
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Module -> rows of its items [R, H], and module -> their positions on the host [R]."""
        from megatron_mimo.modules.language.merge import row_positions

        found, places = {}, {}
        tokens = torch.from_numpy(encoded.tokens)[None]
        for module, of_module in encoded.items.items():
            packed = self.run.data.inputs[module].pack(of_module, [0] * len(of_module))
            assert packed is not None
            on_device = map_tensors(packed, lambda tensor: tensor.to(self.device))
            found[module] = self._modules[module](on_device, None)
            places[module] = row_positions(tokens, self.run.tokenizer.placeholder_ids[module])
        return found, places

    def _joined(
        self, rows: Mapping[str, Tensor], places: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        from megatron_mimo.modules.language.merge import join_rows

        return join_rows(rows, {module: at.to(self.device) for module, at in places.items()})

    def decoding(
        self, max_length: int, encoded: EncodedQuestion | None = None
    ) -> "Decoding | HfDecoding":
        """A new text of the language model.

        Args:
            max_length: Largest number of tokens of question and answer together.
            encoded: The question, for models that read more of its items than their rows.
        """
        from megatron_mimo.modules.hf.decoding import HfDecoding
        from megatron_mimo.modules.hf.language import HfLanguage
        from megatron_mimo.modules.language.decoding import Decoding
        from megatron_mimo.modules.language.module import LanguageModule

        language = self._modules[self.run.resolved.architecture.target_name]
        if isinstance(language, HfLanguage):
            return HfDecoding(language, self._facts(encoded))
        assert isinstance(language, LanguageModule)
        return Decoding(language, max_length)

    def _facts(self, encoded: EncodedQuestion | None) -> dict[str, Tensor]:
        """Integers of the items beside their rows, by name, int64 [N, ...]."""
        found = {} if encoded is None else collate_facts([encoded], self.run.data.inputs)
        return {name: values.to(self.device) for name, values in found.items()}

    @property
    def ends(self) -> frozenset[int]:
        """Numbers of the tokens that end an answer."""
        return self._ends


class Stream(Iterator[str]):
    """Pieces of an answer's text, as the model writes them.

    Args:
        model: The model that answers.
        encoded: The question.
        sampling: How tokens are chosen.
    """

    def __init__(self, model: LoadedModel, encoded: EncodedQuestion, sampling: Sampling) -> None:
        self._model = model
        self._encoded = encoded
        self._tokens: list[int] = []
        self._prompt_tokens = len(encoded.tokens)
        self._text = ""
        self._stopped: Literal["end", "length", "left"] = "left"
        self._start = time.perf_counter()
        self._seconds = 0.0
        self._pieces = self._write(sampling)

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text += piece
        return piece

    def __iter__(self) -> Self:
        return self

    @property
    def answer(self) -> Answer:
        """The answer so far; once the pieces are exhausted, the whole of it."""
        return Answer(
            text=self._text,
            tokens=tuple(self._tokens),
            prompt_tokens=self._prompt_tokens,
            stopped=self._stopped,
            seconds=self._seconds,
        )

    def _write(self, sampling: Sampling) -> Iterator[str]:
        model, tokenizer = self._model, self._model.run.tokenizer
        random, pieces = _generator(sampling.seed), Pieces(tokenizer)
        # The last token is written and never read.
        most = len(self._encoded.tokens) + sampling.max_new_tokens - 1
        decoding = model.decoding(most, self._encoded)
        tokens, rows, positions = model.read(self._encoded)
        self._prompt_tokens = len(tokens)
        logits = decoding.read(tokens[None].to(model.device), rows, positions)
        while True:
            # The table has more rows than the tokenizer has tokens.
            token = choose(logits[: tokenizer.num_tokens], sampling, random)
            self._seconds = time.perf_counter() - self._start
            if token in model.ends:
                self._stopped = "end"
                break
            self._tokens.append(token)
            if piece := pieces.push(token):
                yield piece
            if len(self._tokens) == sampling.max_new_tokens:
                self._stopped = "length"
                break
            logits = decoding.read(torch.tensor([[token]], device=model.device))
        if piece := pieces.flush():
            yield piece


def load(
    path: str | Path,
    *,
    device: str = "auto",
    tokenizer_model: str | None = None,
    custom_import: Sequence[str] = (),
    trust_checkpoint: bool = False,
) -> LoadedModel:
    """Load a trained model in this process, whatever layout trained it.

    Call it before anything imports megatron-core: on a host it has to be adapted first.

    Args:
        path: Folder that `--save` named, of which the newest checkpoint is taken, or the folder of
            one checkpoint; or a folder of transformers.
        device: Kind of device: "auto" takes a GPU where there is one, else "cpu" or "cuda".
        tokenizer_model: Folder of the tokenizer in place of the run's.
        custom_import: Modules that the run's `--custom-import` may name.
        trust_checkpoint: Whether files of the checkpoint may run code.

    Raises:
        ValueError: There is no model, it is damaged, or something that it needs is not there; the
            message names it.
    """
    where = resolve_device(device)
    run = read_run(
        path, tokenizer_model=tokenizer_model, custom_import=custom_import, trust=trust_checkpoint
    )
    prepare_megatron_core(where)
    from megatron_mimo.inference.modules import load_modules

    return LoadedModel(run, load_modules(run, trust=trust_checkpoint), where.torch)


def _generator(seed: int | None) -> torch.Generator:
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return random
