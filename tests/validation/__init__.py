"""What a machine with GPUs has to show: `scripts/validate_gpu.sh`, and the page that it fills."""
