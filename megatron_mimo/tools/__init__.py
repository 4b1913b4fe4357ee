"""Programs beside training: demo, plan, report, parity, and tools for data and checkpoints."""
