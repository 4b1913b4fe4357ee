"""A model class for lmms-eval: `lmms-eval --model megatron_mimo --model_args run=RUN --tasks ...`.

lmms-eval alone imports this module, by the entry point in pyproject.toml.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.progress import make_progress
from lmms_eval.models.registry_v2 import ModelManifest

from megatron_mimo.tools.evaluate.messages import sampling_of, turns_of, without_effect

MODEL = ModelManifest(
    "megatron_mimo", chat_class_path="megatron_mimo.tools.evaluate.lmms.MegatronMimo"
)
"""What the entry point names: lmms-eval's name for the model, and its class."""

_logger = logging.getLogger(__name__)


class MegatronMimo(lmms):
    """A trained model in this process, asked with the messages of a task.

    Args:
        run: Folder of the run, of one checkpoint, or of a `nemotron_h_omni` model.
        device: Kind of device: auto, cpu or cuda, whose number is not regarded.
        batch_size: Number of questions that are asked at once; this model takes one.
        max_batch_size: Not used.
        tokenizer_model: Folder of the tokenizer in place of the run's.
        custom_import: Modules that the run's --custom-import may name, with semicolons between.
        trust_checkpoint: Whether files of the checkpoint may run code.

    Raises:
        ValueError: There is no model, or the batch size is not 1.
    """

    is_simple: ClassVar[bool] = False

    def __init__(
        self,
        run: str,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        tokenizer_model: str | None = None,
        custom_import: str = "",
        trust_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self._ignored: set[str] = set()
        if str(batch_size) not in ("1", "auto"):
            raise ValueError(f"--batch_size {batch_size}: this model takes 1")
        from megatron_mimo.inference import load

        self._answering = load(
            run,
            device=device.partition(":")[0],
            tokenizer_model=tokenizer_model,
            custom_import=[name for name in custom_import.split(";") if name],
            trust_checkpoint=trust_checkpoint,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers to requests of tasks, in their order.

        Raises:
            ValueError: A message has something other than texts and images.
        """
        answers = []
        with make_progress(total=len(requests), desc="asking") as progress:
            for request in requests:
                _, to_messages, how, document, task, split = request.args
                messages = to_messages(self.task_dict[task][split][document])
                answers.append(self._answer(messages, how))
                progress.update(1)
        return answers

    def _answer(self, messages: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> Any:
        self._name_ignored(how)
        kinds = self._answering.run.data.inputs.values()
        placeholder = next((kind.placeholder for kind in kinds if kind.words.noun == "image"), "")
        turns, images = turns_of(messages, placeholder)
        sampling, until = sampling_of(how)
        stream, text = self._answering.stream(turns, images, **sampling), ""
        for piece in stream:
            text += piece
            if any(end in text for end in until):
                break
        for end in until:
            text = text.partition(end)[0]
        answer = stream.answer
        tokens = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=len(answer.tokens))
        return GenerationResult(text=text, token_counts=tokens)

    def _name_ignored(self, how: Mapping[str, Any]) -> None:
        """Say once of each setting of a task that it has no effect here."""
        ignored = without_effect(how) - self._ignored
        if ignored:
            _logger.warning("no effect of generation_kwargs %s", ", ".join(sorted(ignored)))
            self._ignored |= ignored

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: the base class declares it, for tasks that go on from an answer."""
        raise NotImplementedError(
            "tasks of several rounds (generate_until_multi_round) are not supported by the model "
            "megatron_mimo: choose tasks with output_type generate_until"
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: the base class declares it, and asks chat models for texts only."""
        raise NotImplementedError(
            "tasks by likelihood are not supported by the model megatron_mimo: choose tasks with "
            "output_type generate_until"
        )
