"""Accuracy tables of pruned networks, beside those of the CBS paper: `cbs-bench paper`.

| file | content |
|---|---|
| `study` | what is run: a TOML file of sources, methods, sparsities, seeds and published figures |
| `subject` | a network with its images in memory, which scores weights |
| `pruning` | a method on an instance: a selection, then an update |
| `rows` | the rows of a study: tasks for the engines of `cbs_opt.bench.runs`, results in its store |
| `table`, `pictures`, `report` | from a store to Markdown and HTML |
"""
