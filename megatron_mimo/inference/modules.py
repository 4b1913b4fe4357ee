"""The modules of a model, each whole in this process, filled with the weights of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mimo.inference.run import Run
from megatron_mimo.modules.adapter import BuildContext
from megatron_mimo.modules.families import adapter_of

if TYPE_CHECKING:
    # megatron-core has to be adapted to a host before anything imports it.
    from megatron_mimo.checkpoint.whole import WholeModule
    from megatron_mimo.modules.hf.encoder import HfEncoder
    from megatron_mimo.modules.hf.language import HfLanguage
    from megatron_mimo.modules.stage import ModuleStage


def load_modules(run: Run, *, trust: bool = False) -> "dict[str, ModuleStage]":
    """Build the modules of a run in this process, on the host, and fill them.

    Call `runtime.prepare_megatron_core` first.

    Args:
        run: What the run says of its model.
        trust: Whether files of a checkpoint may run code.

    Returns:
        The modules by name, the language model last, in evaluation mode; no weight has a gradient.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the message lists them.
    """
    from megatron_mimo.checkpoint.whole import load_whole
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    architecture, groups = run.resolved.architecture, solo_groups()
    modules = {}
    with solo_world():
        for name, config in architecture.modules.items():
            if name not in run.resolved.layout.modules:
                continue
            adapter = adapter_of(config)
            context = BuildContext(
                pg_collection=groups,
                params_dtype=run.resolved.params_dtype,
                frozen=frozenset(adapter.parts(config)),
                row_width=architecture.row_width,
                vocab_size=run.vocab_size,
                seq_length=run.resolved.model.seq_length,
                execution=run.resolved.execution,
                initialize=_is_drawn(run),
            )
            modules[name] = adapter.build(adapter.one_stage(config), context)
        if not run.is_checkpoint:
            _load_folder(run, run.path, modules)
        else:
            if run.resolved.lora is not None:
                _load_base(run, modules, trust=trust)
            load_whole(run.path, _whole(run, modules), trust=trust)
            if run.resolved.lora is not None:
                _require_same(run, modules, trust=trust)
    for module in modules.values():
        module.requires_grad_(False)
        module.eval()
    return modules


def _whole(run: Run, modules: "Mapping[str, ModuleStage]") -> "list[WholeModule]":
    """The modules, as a checkpoint of their run has them."""
    from megatron_mimo.checkpoint.whole import SoloGroups, WholeModule
    from megatron_mimo.modules.lora.apply import base_names
    from megatron_mimo.runtime.solo import solo_groups

    resolved, solo, found = run.resolved, SoloGroups(solo_groups()), []
    lora = resolved.lora
    prefixes = resolved.architecture.prefixes(lora=lora is not None)
    for name, module in modules.items():
        left_out: tuple[str, ...] = ()
        if lora is not None:
            frozen = resolved.architecture.frozen_in(name, resolved.freeze)
            targets = resolved.architecture.of_module(name, lora.targets)
            left_out = base_names(module, frozen | targets.keys())
        found.append(WholeModule(module, solo, prefixes[name], left_out))
    return found


def _is_drawn(run: Run) -> bool:
    """Whether weights beside adapters are those that the run drew."""
    first = run.resolved.first_weights
    given = (first.load_hf, first.load_base, first.load_nemotron_checkpoint)
    return run.resolved.lora is not None and all(path is None for path in given)


def _load_base(run: Run, modules: "Mapping[str, ModuleStage]", *, trust: bool) -> None:
    """Fill with the weights that a run with adapters began with, and add its adapters."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.base import load_base
    from megatron_mimo.checkpoint.foreign import fill_nemotron
    from megatron_mimo.model.initialize import initialize_topology_invariant
    from megatron_mimo.modules.lora.apply import add_lora
    from megatron_mimo.runtime.solo import solo_groups

    resolved, whole, group = run.resolved, _whole(run, modules), solo_groups().tp
    first, control = resolved.first_weights, dist.group.WORLD
    assert control is not None and resolved.lora is not None
    if first.load_base is not None:
        load_base(whole, Path(first.load_base), control, trust=trust)
    elif first.load_nemotron_checkpoint is not None:
        path = Path(first.load_nemotron_checkpoint)
        fill_nemotron(whole, path, control, text_alone=len(modules) == 1, trust=trust)
    elif first.load_hf is not None:
        _load_folder(run, Path(first.load_hf), modules)
    if _is_drawn(run):
        for name, module in modules.items():
            initialize_topology_invariant(
                module,
                name=name,
                seed=resolved.data.seed,
                initial=module.initial,
                initial_name=module.initial_name,
                tp_group=group,
                expt_tp_group=group,
            )
    for name, module in modules.items():
        targets = resolved.architecture.of_module(name, resolved.lora.targets)
        add_lora(module, resolved.lora, targets, group)


def _require_same(run: Run, modules: "Mapping[str, ModuleStage]", *, trust: bool) -> None:
    """Refuse adapters of other weights than those that were loaded beside them."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.base import describe_adapters, require_same
    from megatron_mimo.checkpoint.saved_run import read_common

    assert run.resolved.lora is not None and dist.group.WORLD is not None
    stored = read_common(run.path, trust=trust).get("lora")
    found = describe_adapters(run.resolved.lora, _whole(run, modules), dist.group.WORLD)
    require_same(stored, found, run.path)


def _load_folder(run: Run, path: Path, modules: "Mapping[str, ModuleStage]") -> None:
    """Fill from a folder of transformers."""
    from megatron_mimo.model.hf import HfFolder
    from megatron_mimo.model.hf.weights import Places, load_hf
    from megatron_mimo.model.omni.weights import load_omni
    from megatron_mimo.modules.language.module import LanguageModule
    from megatron_mimo.modules.parakeet.module import ParakeetModule
    from megatron_mimo.modules.radio.module import RadioModule
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(path) as folder:
        if isinstance(run.resolved.folder, HfFolder):
            load_hf(folder, ((stage, Places()) for stage in hf_stages(modules)))
            return
        encoder = video = audio = language = None
        for stage in modules.values():
            match stage:
                case RadioModule() if stage.architecture.images:
                    encoder = stage
                case RadioModule():
                    video = stage
                case ParakeetModule():
                    audio = stage
                case LanguageModule():
                    language = stage
        load_omni(
            folder,
            encoder=encoder,
            video_encoder=video,
            audio=audio,
            language=language,
            without=run.resolved.first_weights.without,
        )


def hf_stages(modules: "Mapping[str, ModuleStage]") -> "list[HfEncoder | HfLanguage]":
    """The modules of a model of transformers' own forward."""
    from megatron_mimo.modules.hf.encoder import HfEncoder
    from megatron_mimo.modules.hf.language import HfLanguage

    found = []
    for module in modules.values():
        assert isinstance(module, HfEncoder | HfLanguage)
        found.append(module)
    return found
