"""The modules of a model, each whole in this process, filled with the weights of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_mimo.inference.run import Run
from megatron_mimo.modules.adapter import BuildContext
from megatron_mimo.modules.families import adapter_of

if TYPE_CHECKING:
    # megatron-core has to be adapted to a host before anything imports it.
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
    from megatron_mimo.checkpoint.whole import SoloGroups, WholeModule, load_whole
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    architecture, groups = run.resolved.architecture, solo_groups()
    prefixes, modules = architecture.prefixes(), {}
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
                initialize=False,
            )
            modules[name] = adapter.build(adapter.one_stage(config), context)
        if run.is_checkpoint:
            solo = SoloGroups(groups)
            whole = [WholeModule(m, solo, prefixes[name]) for name, m in modules.items()]
            load_whole(run.path, whole, trust=trust)
        else:
            _load_folder(run, modules)
    for module in modules.values():
        module.requires_grad_(False)
        module.eval()
    return modules


def _load_folder(run: Run, modules: "Mapping[str, ModuleStage]") -> None:
    """Fill from a folder of transformers, whose architecture has one source."""
    from megatron_mimo.model.hf import HfFolder
    from megatron_mimo.model.hf.weights import Places, load_hf
    from megatron_mimo.model.omni.weights import load_omni
    from megatron_mimo.modules.language.module import LanguageModule
    from megatron_mimo.modules.radio.module import RadioModule
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(run.path) as folder:
        if isinstance(run.resolved.folder, HfFolder):
            load_hf(folder, ((stage, Places()) for stage in hf_stages(modules)))
            return
        encoder, language = modules.values()
        assert isinstance(encoder, RadioModule) and isinstance(language, LanguageModule)
        load_omni(folder, encoder=encoder, language=language)


def hf_stages(modules: "Mapping[str, ModuleStage]") -> "list[HfEncoder | HfLanguage]":
    """The modules of a model of transformers' own forward."""
    from megatron_mimo.modules.hf.encoder import HfEncoder
    from megatron_mimo.modules.hf.language import HfLanguage

    found = []
    for module in modules.values():
        assert isinstance(module, HfEncoder | HfLanguage)
        found.append(module)
    return found
