"""Programs around training: the demo and its report."""
