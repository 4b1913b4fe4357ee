"""Faults of the modules: initial weights, embeddings, projector, layers, documents."""

from tests.faults.fault import Fault

MODEL = (
    Fault(
        "experts-numbered-by-replica",
        "model/mimo.py",
        "first_expert=groups.place.ep * module.experts_per_rank",
        "first_expert=groups.place.dp * module.experts_per_rank",
        "Initial weights of experts follow the dp rank: ep over tp ranks, or dp > 1 without ep.",
    ),
    Fault(
        "experts-cut-by-dense-tp",
        "model/initialize.py",
        "group = expt_tp_group if is_expert(parameter) else tp_group",
        "group = tp_group",
        "Experts' initial weights are cut by the dense tp size: experts with expt-tp other than "
        "tp.",
    ),
    Fault(
        "encoder-drawn-on-the-language-grid",
        "model/mimo.py",
        "_initialize(module, name, build, groups)\n",
        "_initialize(module, name, build, topology.target or groups)\n",
        "The encoder's initial weights are cut by the language model's tp size: colocated grids "
        "of different tp.",
    ),
    Fault(
        "layers-numbered-by-stage",
        "weights/names.py",
        "layer = _LAYER.search(name)",
        "layer = None",
        "Each stage draws the weights of the first layers: pp > 1, of encoder and LLM.",
    ),
    Fault(
        "residual-scale-of-own-layers",
        "modules/gpt/adapter.py",
        "transformer_initial(name, config.init_method_std, config.num_layers)",
        "transformer_initial(name, config.init_method_std, len(model.decoder.layers))",
        "Projections into the residual stream are scaled by the layers of a stage: dense LLM "
        "with pp > 1.",
    ),
    Fault(
        "tied-copy-drawn-by-its-own-name",
        "modules/language/module.py",
        "return _EMBEDDING if tied and name == _OUTPUT else name",
        "return name",
        "The last stage's copy of a tied weight starts from other values: tied embeddings with "
        "pp > 1.",
    ),
    Fault(
        "mamba-projection-cut-in-one",
        "weights/shards.py",
        "for part in _parts(full, parameter, axis)]",
        "for part in (full,)]",
        "Gate, channels and steps of a Mamba layer are not cut each by itself: hybrid LLM with "
        "tp > 1 and weights drawn by name.",
    ),
    Fault(
        "mamba-projection-read-in-one",
        "weights/shards.py",
        "    if sizes is None:\n        blocks *=",
        "    if sizes is None or len(sizes) > 2:\n        blocks *=",
        "As mamba-projection-cut-in-one, of weights from a folder: hybrid LLM with tp > 1.",
    ),
    Fault(
        "every-stage-seeded-alike",
        "model/mimo.py",
        "        pp_rank=place.pp,\n",
        "        pp_rank=0,\n",
        "Stages draw equal weights from their random streams: pp > 1 with --init megatron.",
    ),
    Fault(
        "tensor-ranks-seeded-alike",
        "model/mimo.py",
        "        tp_rank=place.tp,\n        pp_rank",
        "        tp_rank=0,\n        pp_rank",
        "Shards of a weight are equal: tp > 1 with --init megatron.",
    ),
    Fault(
        "position-table-without-a-corner",
        "modules/radio/embedding.py",
        "for tap in range(images.position_index.size(1)):",
        "for tap in range(images.position_index.size(1) - 1):",
        "A quarter of the position table's gradient is lost, on every layout alike: only a "
        "reference of other code shows it.",
    ),
    Fault(
        "class-token-gradient-of-one-image",
        "modules/radio/embedding.py",
        "of_class = of_class.view(len(images.lengths), *ctx.class_shape).sum(0)",
        "of_class = of_class.view(len(images.lengths), *ctx.class_shape)[0]",
        "Class tokens learn from the shortest image that a rank runs in a microbatch: layouts "
        "that share images out otherwise.",
    ),
    Fault(
        "projector-bias-lost-under-tp",
        "modules/projector/projector.py",
        "return output if bias is None else output + bias",
        "return output",
        "The projector's last bias, zero at first, is not added: encoder tp > 1.",
    ),
    Fault(
        "residual-bias-lost-under-tp",
        "kernels/layer_scale.py",
        "hidden = (hidden if bias is None else hidden + bias) * self.scale",
        "hidden = hidden * self.scale",
        "Biases after attention and MLP are not added: encoder tp > 1 with a trained layer scale.",
    ),
    Fault(
        "vision-cut-off",
        "modules/radio/module.py",
        "gather_rows(tokens, images.row_index, row_size)",
        "gather_rows(tokens.detach(), images.row_index, row_size)",
        "The vision transformer gets no gradient, the projector does, on every layout alike.",
    ),
    Fault(
        "mamba-norm-over-all-channels",
        "kernels/ssd.py",
        "self.group_size = group_size or hidden_size",
        "self.group_size = hidden_size",
        "A Mamba layer's norm spans all channels of a tp rank: hybrid LLM with tp > 1, or a "
        "reference of other code.",
    ),
    Fault(
        "documents-share-attention",
        "model/inputs.py",
        "return packed_documents(text.cu_seqlens, text.lengths, held.cut, held.cp_rank)",
        "return packed_documents(\n"
        "        text.cu_seqlens, (sum(text.lengths[:2]), *text.lengths[2:])\n"
        "    )",
        "The first two documents of a packed sequence see each other, on every layout alike.",
    ),
    Fault(
        "documents-share-states",
        "kernels/packed.py",
        "np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)",
        "np.repeat(np.arange(len(lengths), dtype=np.int32) // 2, lengths)",
        "Mamba's states run on from every first document into every second, on every layout alike.",
    ),
    Fault(
        "documents-share-the-convolution",
        "kernels/ssd.py",
        "            earlier = earlier * same[..., None]\n",
        "            earlier = earlier * same[..., None] if back > 1 else earlier\n",
        "The convolution of a document's first token sees the token before it: packing, hybrid.",
    ),
    Fault(
        "states-cross-chunks",
        "kernels/ssd.py",
        "        (last == previous)[..., 0],\n",
        "        torch.ones_like(last[..., 0], dtype=torch.bool),\n",
        "Mamba's states run on into documents that begin with a chunk of 64 tokens or in an "
        "earlier one: packing, hybrid, sequences of more than one chunk.",
    ),
)
