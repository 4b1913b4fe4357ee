"""Faults of samples: who reads which, what is a target, what a packed sequence holds."""

from tests.faults.fault import Fault

DATA = (
    Fault(
        "lanes-overlap-by-a-sample",
        "data/reading/stream.py",
        "first = (microbatch * self._num_lanes + self._lane) * self._size\n",
        "first = (microbatch * self._num_lanes + self._lane) * self._size + self._lane\n",
        "Lanes after the first begin a sample late: LLM dp > 1.",
    ),
    Fault(
        "targets-of-text-only-microbatches",
        "data/loader/stream_loader.py",
        "lane: sum(document.target_tokens for document in of_lane)\n",
        "lane: sum(document.target_tokens for document in of_lane if document.items)\n",
        "Targets of samples without an image do not count in the divisor: text-only samples.",
    ),
    Fault(
        "mask-one-token-early",
        "data/loader/collate.py",
        "loss_mask[i, :length] = sample.targets[1:]",
        "loss_mask[i, :length] = sample.targets[:-1]",
        "The loss is taken a token late, on every layout alike: only a reference of other code "
        "shows it.",
    ),
    Fault(
        "packed-labels-cross-documents",
        "data/loader/collate.py",
        "        labels[start:stop] = document.tokens[1:]\n",
        "        labels[start:stop] = np.append(document.tokens[2:], document.tokens[-1:])\n",
        "Labels of packed sequences are a token further on: packing.",
    ),
    Fault(
        "lanes-share-workers",
        "data/reading/readers.py",
        "return tuple(range(lane * self.per_lane, (lane + 1) * self.per_lane))",
        "return tuple(range(lane, lane + self.per_lane))",
        "Lanes read some of the same samples: energon with several workers a lane, LLM dp > 1.",
    ),
    Fault(
        "images-out-of-order",
        "data/loader/stream_loader.py",
        "packed = self._config.inputs[module].pack(items, seeds)",
        "packed = self._config.inputs[module].pack(\n"
        "                sorted(items, key=lambda item: item.rows), seeds\n"
        "            )",
        "A rank's images are encoded in another order than their rows travel: several images a "
        "microbatch.",
    ),
    Fault(
        "readers-stay-at-the-first-step",
        "data/loader/share.py",
        "        self._state = ready.state\n",
        "        self._state = ready.state if self._state is None else self._state\n",
        "A checkpoint says where the readers stood after the run's first step: resuming whole "
        "runs.",
    ),
)
