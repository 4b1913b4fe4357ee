"""Samples of prepared datasets and blends, parsed as in training, with the fields of their JSON."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from megatron.energon import stateless

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import parse_json
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.tools.data.reading import Split, in_stored_order
from megatron_mimo.tools.evaluate.dataset import Stored, completed, fields_of


def read_prepared(config: DataConfig, split: Split, tokenizer: Tokenizer) -> Iterator[Stored]:
    """Every sample of a split once, in stored order, with the fields of its JSON.

    Args:
        config: Settings with the dataset's path.
        split: Name of the split.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The dataset cannot be opened or read.
    """
    yield from in_stored_order(config, split, _Parser(config, tokenizer, content=()))


class _Parser(MimoTaskEncoder):
    """Parses a stored sample, and does not encode it: it may lack what training needs."""

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Any:
        """Parse a sample."""
        fields: Mapping[str, Any] = {}
        parts = getattr(sample, "parts", {})
        for name in parts:
            if name.lower() == "json":
                part = parts[name]
                # `parse` says what is wrong with it, and names the sample.
                with suppress(MalformedError):
                    content = parse_json(part) if isinstance(part, bytes) else part
                    fields, parts[name] = fields_of(content), completed(content)
        return Stored(sample.__key__, self.parse(sample), fields)
