"""How well a model answers, at every granularity and as its router chooses; benchmarks, plots and explanations."""
