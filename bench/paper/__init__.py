"""Accuracy tables of pruned networks, beside those of the CBS paper: `cbs-bench paper`.

| file | content |
|---|---|
| `study`, `study_file` | what is run: sources, methods, sparsities, seeds and published figures; read from TOML |
| `subject` | a network with its images in memory, which scores weights |
| `pruning` | a method on an instance: a selection, then an update |
| `rows` | the rows of a study: tasks for `cbs_opt.engines`, results in its store |
| `results`, `pictures`, `report` | from a store to Markdown and HTML |
"""
