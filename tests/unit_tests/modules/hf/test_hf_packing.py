"""Documents that share a sequence compute what each of them computes alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf.models import CONFIGS


def apart(name: str, folder: str) -> dict[str, float]:
    """Largest differences of logits of documents that share a sequence, by what was changed."""
    import torch
    from torch import Tensor

    from megatron_mimo.kernels.packed import packed_documents
    from megatron_mimo.modules.hf.language import HfLanguage
    from tests.hf.models import IMAGE, build, image
    from tests.hf.steps import runner_of
    from tests.integration.engines import layout

    build(name).save_pretrained(folder)
    runner = runner_of(folder, layout({}, {}))
    (model,) = (r.module for r in runner.model.replicas if isinstance(r.module, HfLanguage))
    _, count, facts = image(name, 0)
    width = model.architecture.hidden_size * model.architecture.row_parts

    def document(seed: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Text, an image and text, with rows."""
        random = torch.Generator().manual_seed(seed)
        texts = [torch.randint(3, 240, (n,), generator=random) for n in (first, last)]
        tokens = torch.cat([texts[0], torch.full((count,), IMAGE), texts[1]])
        return tokens, torch.randn(count, width, generator=random) / 10

    @torch.no_grad()
    def logits(*documents: tuple[Tensor, Tensor]) -> list[Tensor]:
        lengths = [len(tokens) for tokens, _ in documents]
        positions = torch.cat([torch.arange(length) for length in lengths])
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        found = model(
            torch.cat([tokens for tokens, _ in documents])[None],
            positions[None],
            None,
            torch.cat([rows for _, rows in documents]),
            None,
            documents=packed_documents(bounds, tuple(lengths)) if len(lengths) > 1 else None,
            facts={key: torch.tensor([value] * len(lengths)) for key, value in facts.items()},
        )
        return list(found[0].split(lengths))

    # The image of one document ends where that of the next begins.
    first, second, third = document(1, 9, 0), document(2, 0, 12), document(3, 5, 1)
    other_first, other_second = document(4, 9, 0), document(5, 0, 12)
    whole = logits(first, second, third)
    alone = [logits(one)[0] for one in (first, second, third)]
    before, after = logits(other_first, second, third), logits(first, other_second, third)

    def most(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return max((a - b).abs().max().item() for a, b in pairs)

    return {
        "alone": most(list(zip(whole, alone, strict=True))),
        "other first": most(list(zip(before, whole, strict=True))[1:]),
        "other second": most([(after[0], whole[0]), (after[2], whole[2])]),
        "changed": min(most([(before[0], whole[0])]), most([(after[1], whole[1])])),
        "scale": max(one.abs().max().item() for one in whole),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_no_document_sees_another(
    name: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    (found,) = run_ranks(1, apart, name, str(tmp_path / "folder"), timeout=120)
    assert found.pop("changed") > 0.01 * found["scale"]
    scale = found.pop("scale")
    assert max(found.values()) < 1e-5 * scale, found
