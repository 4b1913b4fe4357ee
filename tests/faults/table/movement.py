"""Faults of what travels: shards of the sequence, the bridge, the schedule, stages."""

from tests.faults.fault import Fault

MOVEMENT = (
    Fault(
        "chunks-in-a-row",
        "topology/sequence.py",
        "for i in (cp_rank, 2 * self.cp - 1 - cp_rank))",
        "for i in (2 * cp_rank, 2 * cp_rank + 1))",
        "A cp rank reads two neighbouring chunks where attention takes the first and the last: "
        "cp > 1.",
    ),
    Fault(
        "packed-sequence-in-chunks",
        "bridge/plan.py",
        "cut = self._sharding.of(documents[entry.lane] if documents else ())",
        "cut = self._sharding.of(())",
        "Rows of a packed sequence go to the ranks that would hold its chunks: packing, cp > 1.",
    ),
    Fault(
        "positions-of-the-first-rank",
        "kernels/packed.py",
        "for piece in cut.pieces[cp_rank]]",
        "for piece in cut.pieces[0]]",
        "Every cp rank rotates queries and keys by the positions of the first: packing, cp > 1, a "
        "model with rotary embeddings.",
    ),
    Fault(
        "late-part-of-another-rank",
        "kernels/cut.py",
        "low, high = low + head, high - tail",
        "low, high = low + head, high - count + head - 1",
        "A token of a document that is split has two ranks or none: packing, cp > 1.",
    ),
    Fault(
        "sequence-shards-swapped",
        "topology/sequence.py",
        "tp_rank * size, (tp_rank + 1) * size)",
        "(self.tp - 1 - tp_rank) * size, (self.tp - tp_rank) * size)",
        "Rows go to the tp ranks in reverse order: sequence parallelism with tp > 1.",
    ),
    Fault(
        "shards-by-tp-first",
        "topology/sequence.py",
        "return cp_rank * self.tp + tp_rank if self.sequence_parallel else cp_rank",
        "return tp_rank * self.cp + cp_rank if self.sequence_parallel else cp_rank",
        "Shards are numbered along tp first and cut along cp first: cp > 1 with sequence "
        "parallelism.",
    ),
    Fault(
        "chunks-gathered-out-of-order",
        "kernels/attention.py",
        "return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)",
        "return torch.cat([chunks[:, 0], chunks[:, 1]]).flatten(0, 1)",
        "Keys and values of the second half of a sequence stand in the order of ranks: cp > 1.",
    ),
    Fault(
        "causal-mask-one-short",
        "kernels/attention.py",
        "            visible = _lower_triangle(length, end, query.device, at_end=True)\n"
        "            outputs",
        "            visible = _lower_triangle(length, end, query.device, at_end=True).tril(\n"
        "                end - length - (number > 0)\n"
        "            )\n"
        "            outputs",
        "After the first chunk a position does not see itself: cp > 1.",
    ),
    Fault(
        "loss-mask-of-the-first-positions",
        "model/inputs.py",
        "part(text.loss_mask)",
        "text.loss_mask[:, : len(held.read)]",
        "Every cp rank masks its loss as the first positions of the sequence: cp > 1.",
    ),
    Fault(
        "rows-by-encoder-rank",
        "bridge/plan.py",
        "        runs: dict[int, list[Interval]] = {}\n        held = 0\n"
        "        for entry in self.entries(manifest):",
        "        runs: dict[int, list[Interval]] = {}\n        held = 0\n"
        "        for entry in sorted(self.entries(manifest), key=lambda e: e.source_rank):",
        "A lane lays its rows in the order of encoder ranks, which microbatches rotate: fan-in, "
        "from the second microbatch on.",
    ),
    Fault(
        "rows-of-sources-swapped",
        "modules/language/merge.py",
        "    return torch.cat(parts), torch.cat(places)\n",
        "    return torch.cat(parts[::-1]), torch.cat(places)\n",
        "Rows of several sources stand at each other's tokens: two modules with items in a "
        "microbatch.",
    ),
    Fault(
        "rows-counted-over-all-bridges",
        "bridge/plan.py",
        "return (entry for entry in manifest if entry.module == self._grid.name and entry.rows)",
        "return (entry for entry in manifest if entry.rows)",
        "A bridge plans the rows of every source: two modules with items in a microbatch.",
    ),
    Fault(
        "rows-by-sequence",
        "bridge/plan.py",
        "        runs: dict[tuple[int, int], list[Interval]] = {}\n        held = 0\n"
        "        for entry in self.entries(manifest):",
        "        runs: dict[tuple[int, int], list[Interval]] = {}\n        held = 0\n"
        "        for entry in sorted(self.entries(manifest), key=lambda e: e.sequence):",
        "An encoder rank takes its rows to lie by sequence, then lane: fan-out with several "
        "samples in a microbatch.",
    ),
    Fault(
        "runs-gathered-backwards",
        "bridge/transport.py",
        "torch.cat([outgoing.rows[a:b] for a, b in message.runs], out=parcel)",
        "torch.cat([outgoing.rows[a:b] for a, b in reversed(message.runs)], out=parcel)",
        "A message of rows in several pieces carries them in reverse: images cut by sequence "
        "shards, or several images of a shard.",
    ),
    Fault(
        "own-runs-backwards",
        "bridge/transport.py",
        "return parts[0] if len(parts) == 1 else torch.cat(parts)",
        "return parts[0] if len(parts) == 1 else torch.cat(parts[::-1])",
        "Rows in several pieces that stay on their rank are laid in reverse: colocated grids "
        "whose encoder rank serves only a part of its lane's shard.",
    ),
    Fault(
        "backward-rows-of-one-shard",
        "bridge/transport.py",
        "for message, landing in self._landings:\n",
        "for message, landing in self._landings[:1]:\n",
        "Of the gradients that arrive in several pieces from several ranks, one rank's are used "
        "and the others are those of an earlier microbatch: partial images over sequence "
        "shards.",
    ),
    Fault(
        "last-piece-dropped",
        "bridge/transport.py",
        "_scatter_runs(self.rows, message.runs, landing)",
        "_scatter_runs(self.rows, message.runs[:-1], landing)",
        "The last piece of a message in several pieces is left as it was: partial images over "
        "sequence shards.",
    ),
    Fault(
        "buffers-back-too-early",
        "schedule/stage.py",
        "                found[name] = rows.detach().requires_grad_(traffic.returns[m])\n",
        "                found[name] = rows.detach().requires_grad_(traffic.returns[m])\n"
        "                traffic.release_forward(m)\n",
        "The buffer of hidden states is used again while backward still needs it: a later stage "
        "with several microbatches under way, as an encoder of pp > 1 with run-ahead has.",
    ),
    Fault(
        "first-microbatch-not-back-over-the-bridge",
        "schedule/executor.py",
        "returns=[gradients and source in self._config.flow.returning] * len(plans),",
        "returns=[\n"
        "                gradients and source in self._config.flow.returning and m > 0\n"
        "                for m in range(len(plans))\n"
        "            ],",
        "The encoder gets no gradient of a step's first microbatch.",
    ),
    Fault(
        "first-microbatch-not-back-to-the-first-stage",
        "schedule/executor.py",
        "            [gradients and name in self._config.flow.inside] * len(plans),\n",
        "            [\n"
        "                gradients and name in self._config.flow.inside and m > 0\n"
        "                for m in range(len(plans))\n"
        "            ],\n",
        "The encoder's first stage gets no gradient of a step's first microbatch: encoder pp > 1.",
    ),
    Fault(
        "samples-before-positions",
        "model/program.py",
        "hidden = hidden.view(self._model.sharding.shard_length, text.batch, -1)",
        "hidden = hidden.unflatten(0, (text.batch, -1)).transpose(0, 1)",
        "Later stages mix positions and samples: LLM pp > 1 with several samples in a microbatch.",
    ),
    Fault(
        "packed-bounds-on-the-first-stage",
        "model/inputs.py",
        "documents=_documents(text, held)",
        "documents=_documents(text, held) if first else None",
        "Documents see each other after the first stage: packing with LLM pp > 1.",
    ),
    Fault(
        "images-mixed-on-later-stages",
        "modules/radio/vit.py",
        "packed = packed_segments(images.cu_seqlens, images.lengths)",
        "packed = packed_segments(\n"
        "                images.cu_seqlens,\n"
        "                images.lengths if self.is_first else (images.num_tokens,),\n"
        "            )",
        "Images of a microbatch see each other after the first stage: encoder pp > 1.",
    ),
    Fault(
        "rows-at-other-samples",
        "modules/language/merge.py",
        "return position * held.shape[0] + sample",
        "return sample * held.shape[1] + position",
        "Rows go to wrong positions where a microbatch holds several samples.",
    ),
    Fault(
        "lanes-of-moved-items-unknown",
        "data/loader/balanced.py",
        "if read or (m, lane) in taking_part:",
        "if read:",
        "A rank runs items of lanes that it does not read, and does not know where their rows go: "
        "balanced dispatch.",
    ),
    Fault(
        "moved-items-without-their-seeds",
        "data/loader/balanced.py",
        "arrived[source, item.place] = Work(*decode(buffer, self._types))",
        "arrived[source, item.place] = Work(decode(buffer, self._types)[0], 0)",
        "Items that run elsewhere are augmented in another way: balanced dispatch with crops.",
    ),
    Fault(
        "gradients-of-the-first-rows",
        "modules/radio/rows.py",
        "own: Tensor = gradient.index_select(0, ctx.own_rows)",
        "own: Tensor = gradient[: len(ctx.own_rows)]",
        "Every cp rank of the encoder takes the gradients of the first rows: encoder cp > 1.",
    ),
)
