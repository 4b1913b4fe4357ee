#!/usr/bin/env bash
# Purpose: one node of eight GPUs: the 20-layer preset from random weights, made-up samples.
set -euo pipefail

export MIMO_LOCAL_RANKS=8
export NCCL_PROTO=Simple

flags=(
  # grids
  --encoder-offset 0
  --encoder-tp 1
  --encoder-cp 1
  --encoder-pp 1
  --encoder-dp 4
  --encoder-ep 1
  --encoder-expt-tp 1
  --llm-offset 4
  --llm-tp 2
  --llm-cp 1
  --llm-pp 1
  --llm-dp 2
  --llm-ep 4
  --llm-expt-tp 1
  --sequence-parallel
  --encoder-run-ahead 1

  # model
  --model-provider nemotron-moe-vlm-20l
  --training-stage stage2
  --bf16
  --moe-grouped-gemm
  --moe-router-force-load-balancing
  --init megatron
  --seq-length 8192
  --image-token "<image>"

  # images
  --dynamic-resolution
  --dynamic-resolution-rule nemotron-omni
  --dynamic-resolution-min-patches 4
  --dynamic-resolution-max-patches 0
  --max-num-tiles 1
  --patch-dim 16
  --class-token-len 10
  --pixel-shuffle

  # data
  --dataset-provider mock
  --mock-dataset-size 1000000
  --text-only-fraction 0.0
  --validate-data-alignment

  # length and learning rate
  --micro-batch-size 1
  --global-batch-size 8
  --train-samples 400
  --lr-warmup-samples 0
  --lr-decay-samples 121046313
  --lr-wsd-decay-samples 1
  --lr-wsd-decay-style minus_sqrt
  --lr-decay-style WSD
  --lr 1.2e-3
  --min-lr 1.2e-5

  # optimizer
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --adam-eps 1e-8
  --clip-grad 1.0
  --seed 1234
  --overlap-grad-reduce
  --overlap-param-gather
  --ddp-num-buckets 8
  --ddp-pad-buckets-for-high-nccl-busbw

  # checkpoints, logs, limits
  --save-interval 1000
  --eval-interval 0
  --log-interval 1
  --exit-signal-handler
  --distributed-timeout-minutes 10
  --device cuda
)

exec bash "$(dirname "$0")/launch.sh" "$0" "${flags[@]}"
