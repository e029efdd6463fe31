"""The paper's eleven benchmarks: records, prompts and scorers, without JAX and without PyTorch.

    records.read(task, folder)         rows of a split: fields and references to images   (parquet, originals)
    task.prompt, task.images           the prompt of a row and its images
    scoring.grade(task, rows, answers) a grade in [0, 1] per answer                       (words, letters, mmmu)
    scoring.metrics(task, rows, ...)   the benchmark's metrics, named as lmms-eval names them

`tasks` declares each benchmark once. Scores equal those of lmms-eval 0.7.3, also where it departs from the benchmark's
authors, because papers report its scores.
"""
