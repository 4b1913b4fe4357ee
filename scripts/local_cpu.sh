#!/usr/bin/env bash
# Purpose: try everything out: four CPU processes, the tiny preset, made-up samples.
set -euo pipefail

export MIMO_LOCAL_RANKS=4

flags=(
  # grids
  --encoder-offset 0
  --encoder-tp 1
  --encoder-cp 1
  --encoder-pp 1
  --encoder-dp 2
  --encoder-ep 1
  --encoder-expt-tp 1
  --llm-offset 2
  --llm-tp 1
  --llm-cp 1
  --llm-pp 1
  --llm-dp 2
  --llm-ep 2
  --llm-expt-tp 1
  --encoder-run-ahead 1

  # model
  --model-provider nemotron-moe-vlm-tiny
  --training-stage stage3
  --fp32
  --init topology-invariant
  --seq-length 64
  --image-token "<image>"

  # images
  --dynamic-resolution
  --dynamic-resolution-rule nemotron-omni
  --dynamic-resolution-min-patches 4
  --dynamic-resolution-max-patches 256
  --max-num-tiles 1
  --patch-dim 8
  --class-token-len 2
  --pixel-shuffle

  # data
  --dataset-provider mock
  --mock-dataset-size 1000
  --text-only-fraction 0.1
  --validate-data-alignment

  # length and learning rate
  --micro-batch-size 2
  --global-batch-size 8
  --train-samples 160
  --lr-warmup-samples 16
  --lr-decay-samples 160
  --lr-decay-style cosine
  --lr 1e-3
  --min-lr 1e-4

  # optimizer
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --adam-eps 1e-8
  --clip-grad 1.0
  --seed 1234

  # checkpoints, logs, limits
  --save-interval 10
  --eval-interval 0
  --log-interval 1
  --exit-signal-handler
  --distributed-timeout-minutes 10
  --device cpu
)

exec bash "$(dirname "$0")/launch.sh" "$0" "${flags[@]}"
