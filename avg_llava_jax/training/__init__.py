"""Training: one loop for all phases, which differ only in their loss and in the components they train."""
