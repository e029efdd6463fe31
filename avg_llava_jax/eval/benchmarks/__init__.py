"""The paper's eleven benchmarks on the host: records, prompts and scorers, without jax and without torch.

    records.read(task, folder)         rows of a split: fields and references to images   (parquet, originals)
    task.prompt, task.images           what a model is asked
    scoring.grade(task, rows, answers) a number in [0, 1] for each answer                 (words, letters, mmmu)
    scoring.metrics(task, rows, ...)   the benchmark's metrics, named as lmms-eval names them

`tasks` describes each benchmark once. Scores equal those of lmms-eval 0.7.3; where it departs from the
benchmark's authors, so do these, because tables in papers are made with it.
"""
