"""One train loop for all phases: data, phase loss, update."""
