"""Stands before PyTorch on the path of runs: training does not need it, and to import it takes longer than JAX.

TensorBoard's writer imports it wherever it finds it.
"""

raise ImportError("these runs are those of a machine without PyTorch")
