"""Transfer of rows from every source module to the target, and of their gradients back."""
