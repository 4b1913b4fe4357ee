"""The language model of a model of transformers as a pipeline stage."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_mimo.kernels.packed import PackedSegments
from megatron_mimo.modules.adapter import BuildContext
from megatron_mimo.modules.hf.config import HfLanguageConfig
from megatron_mimo.modules.hf.costs import head_cost, layer_costs
from megatron_mimo.modules.hf.cut import (
    EMBEDDING_WEIGHT,
    HEAD_WEIGHT,
    LANGUAGE,
    Absent,
    Received,
    is_tied,
    language_stage,
    materialise,
    meta_model,
    stage_bounds,
)
from megatron_mimo.modules.hf.dtypes import cast
from megatron_mimo.modules.hf.experts import divide_experts
from megatron_mimo.modules.hf.packing import LENGTHS, divide_documents, packed_arguments
from megatron_mimo.modules.hf.rows import features_of
from megatron_mimo.modules.hf.tensor_parallel import divide, hook_gradients, language_plan
from megatron_mimo.modules.language.adapter import PART
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.runtime.megatron_core import is_first_stage, is_last_stage, transformer_config
from megatron_mimo.weights.initial import Draw

_NO_FACTS: Mapping[str, Tensor] = MappingProxyType({})


class HfLanguage(ModuleStage):
    """A stage of the language model; the model's own forward runs on each.

    Args:
        architecture: Architecture of the language model.
        context: Groups and settings of the run.

    Raises:
        ValueError: The model cannot be divided so; the message names what stands in the way.
    """

    def __init__(self, architecture: HfLanguageConfig, context: BuildContext) -> None:
        pg = context.pg_collection
        super().__init__(
            config=transformer_config(
                pg,
                params_dtype=context.params_dtype,
                sequence_parallel=False,
                num_layers=architecture.num_layers,
                hidden_size=architecture.hidden_size,
                num_attention_heads=architecture.num_attention_heads,
                num_moe_experts=architecture.num_experts or None,
                moe_ffn_hidden_size=getattr(architecture.text, "moe_intermediate_size", None),
                add_bias_linear=False,
            )
        )
        self.architecture = architecture
        self.pre_process, self.post_process = is_first_stage(pg), is_last_stage(pg)
        self._tp_group = pg.tp
        whole = meta_model(architecture.description)
        plan = language_plan(whole, architecture.family)
        tied = is_tied(whole)
        bounds = stage_bounds(
            architecture,
            pg.pp.size(),
            layer_costs(whole, architecture, context.seq_length),
            head_cost(whole),
        )
        stage = pg.pp.rank()
        model = language_stage(whole, architecture.family, bounds[stage], bounds[stage + 1])
        divide_documents(model.get_submodule(LANGUAGE))
        divide_experts(model.get_submodule(LANGUAGE), pg)
        divide(model, plan, pg.tp, num_experts=architecture.num_experts)
        cast(model, architecture.wide, context.params_dtype)
        if not context.without_memory:
            materialise(model)
        self.model = model
        # megatron-core reduces the gradients of tied embeddings and looks for these.
        self.share_embeddings_and_output_weights = tied
        if tied and self.post_process:
            head = model.get_submodule(LANGUAGE).embed_tokens.weight if self.pre_process else None
            if head is not None:
                model.lm_head.weight = head
            else:
                model.lm_head.weight.shared = True
                model.lm_head.weight.shared_embedding = True
                # A checkpoint has it once.
                model.lm_head.weight.copy_of = f"model.{EMBEDDING_WEIGHT}"
        if tied and self.pre_process and not self.post_process:
            model.get_parameter(EMBEDDING_WEIGHT).shared_embedding = True
        if context.execution.recompute_granularity == "full":
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.requires_grad_(PART not in context.frozen)
        hook_gradients(model)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied weight [V/tp, H] of this stage, under megatron-core's name."""
        name = EMBEDDING_WEIGHT if self.pre_process else HEAD_WEIGHT
        weight: Tensor = self.model.get_parameter(name)
        return weight

    @property
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The only part: the model of transformers."""
        return {PART: self.model}

    @property
    def units(self) -> Sequence[nn.Module]:
        """The decoder layers of this stage."""
        layers: Any = self.model.get_submodule(LANGUAGE).layers
        return [layer for layer in layers if not isinstance(layer, Absent)]

    def materialise(self, device: torch.device) -> None:
        """Give memory to the model, with its constant buffers; weights are undefined."""
        materialise(self.model, device)

    @property
    def experts_per_rank(self) -> int:
        """Number of experts of an MoE layer that a rank holds."""
        return self.architecture.num_experts // int(self.config.expert_model_parallel_size)

    def initial(self, name: str) -> Draw | None:
        """None: all weights are read from the folder."""
        return None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        hidden: Tensor | None,
        rows: Tensor | None,
        positions: Tensor | None,
        labels: Tensor | None = None,
        documents: PackedSegments | None = None,
        facts: Mapping[str, Tensor] = _NO_FACTS,
    ) -> Tensor:
        """Compute per-token losses, logits when there are no labels, or hidden states.

        Args:
            input_ids: Tokens, int64 [B, S], on every stage.
            position_ids: Positions in each document, int64 [B, S]; read where documents share a
                sequence.
            hidden: Hidden states of the previous stage [S, B, H]; None on the first stage.
            rows: Rows of all images [R, row_parts * H], in the order of their tokens, on the first
                stage; None without any.
            positions: Not read: the model places rows by the tokens.
            labels: Target of each position, int64 [B, S]; None before the last stage.
            documents: Boundaries of the documents of a packed sequence; B is 1.
            facts: Integers of the images of the microbatch, by the name of forward's argument,
                int64 [N, ...].

        Returns:
            With labels: cross entropy of each position, float32 [B, S]. Without: this tp rank's
            shard of the logits, [B, S, V/tp]. Before the last stage: hidden states [S, B, H].
        """
        whole = self.model
        arguments = self.arguments(input_ids, rows, facts) | {"use_cache": False}
        if documents is not None:
            assert position_ids is not None
            arguments |= packed_arguments(
                whole, self.architecture.family, documents, position_ids, arguments
            )
            arguments[LENGTHS] = documents.lengths
        if not self.pre_process:
            assert hidden is not None
            received = whole.get_submodule(LANGUAGE).embed_tokens
            assert isinstance(received, Received)
            # Contiguous, as what an embedding gives: some layers take a view of it.
            received.hidden = hidden.transpose(0, 1).contiguous()
        if not self.post_process:
            output: Tensor = whole.model(**arguments).last_hidden_state
            return output.transpose(0, 1)
        logits: Tensor = whole(**arguments).logits
        if labels is None:
            return logits
        losses: Tensor = vocab_parallel_cross_entropy(
            logits.float(), labels, tp_group=self._tp_group
        )
        return losses

    def arguments(
        self, input_ids: Tensor, rows: Tensor | None, facts: Mapping[str, Tensor] = _NO_FACTS
    ) -> dict[str, Any]:
        """Arguments of the model's forward for tokens and what they need of their images.

        Args:
            input_ids: Tokens, int64 [B, S].
            rows: Rows of all images [R, row_parts * H]; None without any.
            facts: Integers of the images, by the name of forward's argument, int64 [N, ...].
        """
        family = self.architecture.family
        found: dict[str, Any] = {"input_ids": input_ids}
        found |= {name: facts[name] for name in family.facts if len(facts.get(name, ()))}
        if family.has_token_types:
            found["mm_token_type_ids"] = (input_ids == self._image_token).long()
        if rows is not None:
            found["mm_encoder_outputs"] = {"image": features_of(rows, self.architecture.row_parts)}
        return found

    @property
    def _image_token(self) -> int:
        token: int = getattr(self.model.config, self.architecture.family.image_token)
        return token
