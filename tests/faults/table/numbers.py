"""Faults of what a run refuses, of losses that are not finite, and of its files."""

from tests.faults.fault import Fault

NUMBERS = (
    Fault(
        "overrides-of-any-size",
        "config/presets/providers.py",
        "    expected = unmet(field, value)\n",
        "    expected = None\n",
        "Numbers of --override and --model-config have no range where they are read.",
    ),
    Fault(
        "bounds-of-flags-not-checked",
        "settings/check.py",
        "        if not all(bound.admits(item) for bound in field.bounds):\n",
        "        if False:\n",
        "Numbers of any field are taken whatever they are.",
    ),
    Fault(
        "loss-not-agreed-on",
        "optim/mimo_optimizer.py",
        "            numbers[-1] = loss\n",
        "            pass\n",
        "A loss that is not finite with gradients that are changes weights, and ends no run.",
    ),
    Fault(
        "loss-counted-by-every-tensor-rank",
        "training/step.py",
        "    return loss_sum if target is not None and target.place.tp == 0 else None\n",
        "    return loss_sum if target is not None else None\n",
        "The agreed loss counts copies of tensor-parallel ranks: LLM tp > 1.",
    ),
    Fault(
        "saves-without-a-finite-loss",
        "training/loop.py",
        "            if finished or (checkpoints.is_due(iteration) and not nonfinite):\n",
        "            if finished or checkpoints.is_due(iteration):\n",
        "Checkpoints among steps that are not finite take the place of good ones.",
    ),
    Fault(
        "ends-well-without-a-finite-loss",
        "training/loop.py",
        "            nonfinite.require_none()\n",
        "            pass\n",
        "A run whose loss stays not finite ends with exit code 0.",
    ),
    Fault(
        "removed-files-not-noticed",
        "runtime/output.py",
        "        return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)\n",
        "        return False\n",
        "A run goes on to write to a file that has been replaced by another.",
    ),
    Fault(
        "undone-events-stay",
        "watch/event_file.py",
        "    return bool(event.step > (samples if over_samples else iteration))\n",
        "    return False\n",
        "TensorBoard shows steps twice after going back.",
    ),
    Fault(
        "events-over-samples-undone-by-iteration",
        "watch/event_file.py",
        "event.step > (samples if over_samples else iteration)",
        "event.step > iteration",
        "Going back takes nearly all points over samples out of TensorBoard.",
    ),
    Fault(
        "folders-not-tried",
        "training/folders.py",
        "        require_folder(flag, Path(folder))\n",
        "        Path(folder)\n",
        "A folder that cannot be written to is found out when the first file is due.",
    ),
    Fault(
        "buffers-beyond-memory",
        "data/reading/capacity.py",
        "    if needed > memory:\n",
        "    if False:\n",
        "Buffers that do not fit into memory are filled until the machine ends the run.",
    ),
)
