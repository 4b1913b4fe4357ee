"""Starts the ranks of one machine, without a launcher such as torchrun or Slurm."""
