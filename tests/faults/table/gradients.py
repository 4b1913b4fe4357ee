"""Faults of sums and divisors: process groups, gradients, norms, the update."""

from tests.faults.fault import Fault

GRADIENTS = (
    Fault(
        "divisor-of-own-lanes",
        "training/step.py",
        "    finalize_gradients(\n        runner.model,\n        num_tokens,",
        "    finalize_gradients(\n        runner.model,\n"
        "        sum(data.lane_target_tokens.values()),",
        "Gradients are divided by the target tokens of the lanes that a rank reads, not by "
        "those of the global batch: wrong where there are several lanes.",
    ),
    Fault(
        "encoder-mean-over-replicas",
        "optim/mimo_optimizer.py",
        "scale = (scales or {}).get(replica.groups.spec.name, 1.0)",
        "scale = (scales or {}).get(replica.groups.spec.name, 1.0)\n"
        "            if replica is not model.target:\n"
        "                scale /= replica.groups.spec.dp",
        "The encoder's gradients are averaged over its replicas: wrong with encoder dp > 1.",
    ),
    Fault(
        "mean-over-context-ranks",
        "optim/mimo_optimizer.py",
        "scale = (scales or {}).get(replica.groups.spec.name, 1.0)",
        "scale = (scales or {}).get(replica.groups.spec.name, 1.0) / replica.groups.spec.cp",
        "The language model's gradients are averaged over its cp ranks: wrong with cp > 1.",
    ),
    Fault(
        "loss-over-dp-alone",
        "training/step.py",
        "dist.all_reduce(loss_sum, group=topology.target.pg_collection.dp_cp)",
        "dist.all_reduce(loss_sum, group=topology.target.pg_collection.dp)",
        "The reported loss leaves out the other cp ranks' positions: cp > 1.",
    ),
    Fault(
        "gradients-over-dp-alone",
        "topology/groups.py",
        '    "dp_cp_gtp_remat": "dp_cp",\n    "intra_dp_cp": "dp_cp",\n',
        '    "dp_cp": "dp",\n    "dp_cp_gtp_remat": "dp",\n    "intra_dp_cp": "dp",\n',
        "Gradients are not summed over cp ranks, whose weights then differ: cp > 1.",
    ),
    Fault(
        "expert-gradients-over-dense-replicas",
        "topology/groups.py",
        '    "expt_dp_gtp_remat": "expt_dp",\n    "intra_expt_dp": "expt_dp",\n',
        '    "expt_dp": "dp",\n    "expt_dp_gtp_remat": "dp",\n    "intra_expt_dp": "dp",\n',
        "Gradients of experts are summed over the dense dp group, which holds other experts: ep "
        "> 1 over dp ranks, or tp ranks that replicate experts.",
    ),
    Fault(
        "expert-bias-without-tp",
        "topology/groups.py",
        "_SYNONYMS = {\n",
        '_SYNONYMS = {\n    "tp_dp_cp": "dp_cp",\n',
        "The expert bias follows the tokens of one tp rank: experts with sequence parallelism.",
    ),
    Fault(
        "expert-bias-without-cp",
        "topology/group_plan.py",
        '    ("tp_dp_cp", ("tp", "cp", "dp")),',
        '    ("tp_dp_cp", ("tp", "dp")),',
        "The expert bias follows the tokens of one cp rank: experts with cp > 1.",
    ),
    Fault(
        "balance-loss-without-cp",
        "topology/groups.py",
        "_SYNONYMS = {\n",
        '_SYNONYMS = {\n    "tp_cp": "tp",\n',
        "The experts' balance loss sees a part of each sequence: experts with cp > 1.",
    ),
    Fault(
        "balance-loss-without-tp",
        "topology/groups.py",
        "_SYNONYMS = {\n",
        '_SYNONYMS = {\n    "tp_cp": "cp",\n',
        "The experts' balance loss sees a part of each sequence: experts with sequence "
        "parallelism.",
    ),
    Fault(
        "balance-loss-of-own-tokens",
        "kernels/router.py",
        "tokens = sent.sum(dim=-1) / self.topk",
        "tokens = routing_map.view(shape).sum(dim=(0, 2)) / self.topk",
        "The experts' balance loss is divided by a rank's own tokens: experts with cp > 1 or "
        "sequence parallelism.",
    ),
    Fault(
        "padding-in-the-balance",
        "model/inputs.py",
        "padding=text.padding[:, held.embedded] if self._reads_padding else None",
        "padding=None",
        "Experts are balanced over positions without a token too: experts with padding.",
    ),
    Fault(
        "padding-in-the-bias",
        "kernels/router.py",
        "routing_map = routing_map & ~padding_mask.unsqueeze(-1)",
        "pass",
        "Biases and loads of experts count positions without a token: experts with padding.",
    ),
    Fault(
        "tied-embedding-not-reduced",
        "modules/language/module.py",
        "self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights",
        "self.share_embeddings_and_output_weights = False",
        "The first and the last stage's copies of a tied weight get gradients of their own, and "
        "start from different weights: tied embeddings with pp > 1.",
    ),
    Fault(
        "replicas-counted-twice-in-the-norm",
        "optim/mimo_optimizer.py",
        "[grad for part in parts for grad in part.get_grads_for_grad_norm()]",
        "[p.grad for part in parts for p in part.get_parameters() if p.grad is not None]",
        "Weights that tp ranks hold alike, and tied ones, count for each rank in the gradient "
        "norm: encoder or LLM tp > 1.",
    ),
    Fault(
        "encoder-not-in-the-norm",
        "optim/mimo_optimizer.py",
        "total = math.sqrt(sum(norm * norm for norm in norms.values()))",
        'total = norms["llm"] or norms["encoder"]',
        "Clipping looks at the language model's norm alone, on every layout alike: only a "
        "reference of other code shows it.",
    ),
    Fault(
        "norm-of-one-rank",
        "optim/mimo_optimizer.py",
        "        dist.all_reduce(message, op=dist.ReduceOp.SUM, group=self._control)\n",
        "        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._control)\n",
        "The norm is that of the rank with the largest: wrong wherever a module has several ranks.",
    ),
    Fault(
        "norm-weights-not-reduced-over-tp",
        "kernels/norms.py",
        "self.weight.sequence_parallel = config.sequence_parallel  # type",
        "self.weight.sequence_parallel = False  # type",
        "Each tp rank trains a norm's weight on its own positions: sequence parallelism.",
    ),
    Fault(
        "norm-biases-not-reduced-over-tp",
        "kernels/norms.py",
        "self.bias.sequence_parallel = config.sequence_parallel  # type",
        "self.bias.sequence_parallel = False  # type",
        "As norm-weights-not-reduced-over-tp, of biases: sequence parallelism with LayerNorm, "
        "which the dense model alone has.",
    ),
    Fault(
        "input-gradient-not-summed-over-tp",
        "kernels/host_layers.py",
        "        if self.allreduce_dgrad:\n",
        "        if self.allreduce_dgrad and self.tp_group.size() > 2:\n",
        "Gradients after a column-parallel layer are those of one tp rank: encoder tp > 1, or "
        "LLM tp > 1 without sequence parallelism.",
    ),
    Fault(
        "last-microbatch-without-backward",
        "schedule/actions.py",
        "    for m in range(num_microbatches):\n        order.append(",
        "    for m in range(max(1, num_microbatches - 1)):\n        order.append(",
        "Every stage leaves out the backward of the last of several microbatches.",
    ),
    Fault(
        "learning-rate-by-microbatches",
        "training/step.py",
        "runner.scheduler.step(increment=global_batch_size)",
        "runner.scheduler.step(increment=2 * len(data.microbatches))",
        "The learning rate follows the number of microbatches, not of samples: layouts, or "
        "batch sizes, with another number of microbatches than the reference.",
    ),
    Fault(
        "learning-rate-moves-without-update",
        "training/step.py",
        "    if update.applied:\n        runner.scheduler",
        "    if update is not None:\n        runner.scheduler",
        "The schedule goes on in steps whose gradients were not finite: fp16, and broken "
        "gradients.",
    ),
    Fault(
        "decay-of-vectors",
        "optim/mimo_optimizer.py",
        "            [replica.ddp],\n            use_gloo",
        "            [replica.ddp],\n            config_overrides={},\n            use_gloo",
        "Biases and norms are decayed too, on every layout alike: only a reference of other "
        "code shows it.",
    ),
    Fault(
        "frozen-projector-trains",
        "modules/radio/module.py",
        'self.projector.requires_grad_("projector" not in frozen)',
        'self.projector.requires_grad_("language" not in frozen)',
        "A frozen projector trains: freezing.",
    ),
    Fault(
        "frozen-encoder-trains-its-class-tokens",
        "modules/radio/vit.py",
        "        self.requires_grad_(False)\n        self.eval()",
        "        self.requires_grad_(False)\n"
        "        if self.is_first:\n"
        "            self.embedding.class_token.requires_grad_(True)\n"
        "        self.eval()",
        "A frozen encoder keeps a trainable weight, which gets no gradient and is decayed: "
        "freezing.",
    ),
    Fault(
        "stale-weights-behind-overlap",
        "model/mimo.py",
        "    ddp.broadcast_params()\n",
        "    ddp.broadcast_params()\n"
        "    if reduce.overlap_params:\n"
        "        ddp.disable_forward_pre_hook(param_sync=False)\n",
        "Updated weights are not gathered before the next forward: overlap of parameters with "
        "LLM dp > 1.",
    ),
    Fault(
        "float16-scale-stays-in-the-gradients",
        "optim/mimo_optimizer.py",
        "scale / (num_target_tokens * loss_scale)",
        "scale / num_target_tokens",
        "Gradients keep the factor of the scaled loss: fp16.",
    ),
    Fault(
        "float16-scale-of-the-balance-loss",
        "training/step.py",
        "    scale_auxiliary_losses(loss_scale)\n",
        "    scale_auxiliary_losses(1.0)\n",
        "The experts' balance loss is not scaled and vanishes when gradients are unscaled: fp16 "
        "with experts.",
    ),
    Fault(
        "float16-scale-never-falls",
        "optim/mimo_optimizer.py",
        "self._scaler.update(not applied)",
        "self._scaler.update(False)",
        "A scale that is too large stays so, and nothing trains: fp16.",
    ),
    Fault(
        "norm-of-the-last-source-alone",
        "optim/mimo_optimizer.py",
        "column = self._names.index(name)",
        "column = max(self._names.index(name), len(self._names) - 2)",
        "Of several sources only the last one's gradients count in the norm: two sources or more.",
    ),
    Fault(
        "participation-by-images",
        "training/agreement.py",
        "int(replica in found) for replica in replicas",
        "sum(\n"
        "                (entry.module, entry.source_rank) == replica\n"
        "                for microbatch in step.microbatches\n"
        "                for entry in microbatch.manifest\n"
        "            )\n"
        "            for replica in replicas",
        "The correction for encoder ranks without images counts images in the place of ranks: "
        "only with that correction, and more than one image.",
    ),
    Fault(
        "evaluation-over-own-lanes",
        "training/step.py",
        "        tokens += agreement.target_tokens\n",
        "        tokens += sum(data.lane_target_tokens.values())\n",
        "The held-out loss is divided by the target tokens of a rank's own lanes: evaluation "
        "with LLM dp > 1.",
    ),
    Fault(
        "expert-load-without-other-stages",
        "watch/experts.py",
        "dist.all_reduce(found, group=groups.pg_collection.intra_dist_opt)",
        "dist.all_reduce(found, group=groups.pg_collection.tp_dp_cp)",
        "The reported load of experts leaves out other stages' layers: experts with pp > 1.",
    ),
    Fault(
        "balance-loss-of-all-lanes",
        "watch/experts.py",
        "found[:, -1] *= experts.per_token",
        "found[:, -1] *= groups.spec.dp * experts.per_token",
        "The reported balance loss is a sum over lanes: experts with LLM dp > 1.",
    ),
    Fault(
        "divided-module-takes-means",
        "model/fully_sharded.py",
        "            unit.set_gradient_divide_factor(1.0)\n",
        "",
        "Gradients of a divided language model are means over its ranks: --sharding fsdp2.",
    ),
    Fault(
        "divided-module-keeps-copies-apart",
        "model/fully_sharded.py",
        "        dist.all_reduce(flat, group=self._group)\n",
        "",
        "Weights of which every rank has a copy learn from the first rank's samples alone: "
        "--sharding fsdp2 in bf16, models with float32 weights.",
    ),
    Fault(
        "divided-module-does-not-publish",
        "model/fully_sharded.py",
        "            dist.broadcast(flat, group=self._group, group_src=0)\n",
        "",
        "Weights of which every rank has a copy stay as they were but on one: as before.",
    ),
    Fault(
        "divided-vectors-decay",
        "optim/sharded_adam.py",
        "return weight.dimensions > 1 and",
        "return weight.dimensions > 0 and",
        "Norms of a divided language model are decayed: --sharding fsdp2.",
    ),
    Fault(
        "divided-update-leaves-short-weights",
        "model/fully_sharded.py",
        "                weight.values.copy_(weight.main)\n",
        "                pass\n",
        "Checkpoints have the weights that a run began with: --sharding fsdp2 in bf16.",
    ),
)
