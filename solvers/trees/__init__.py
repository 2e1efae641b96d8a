"""The branch-and-bound engine: trees over dense components, and tables of components under one budget.

- `prove`: the entry point; `selection_worker`, `joint_worker`: one tree, with `stack`, `best_first` and threads;
- `block_search`, with `tables` and `outlines`: many components under one budget; `enumeration`: few selections;
- `selection_start`, `selection_shift`, `joint_diagonal`: first point and convex form of a tree;
- `recorder`, `recorded_nodes`: the tree again, for a certificate.

`selection`, `joint`, `exact` and `mip` may import it; it imports `kernels` and `problem`.
"""
