"""Where problems come from: networks, their gradients, and the instances that ship.

This room imports the core, `cbs_opt`, and neither `cbs_opt.solvers` nor `cbs_opt.bench`. Importing it loads
nothing more; its modules load torch, and `cbs_opt.instances.digits` scikit-learn, when they are asked for.

- `gradients`: the gradient of every sample, by `torch.func`;
- `fisher`: the empirical Fisher matrix of these gradients, as an instance wants it;
- `training`: a small and exactly repeatable training loop;
- `digits`: the script that makes the files of `library`.
"""
