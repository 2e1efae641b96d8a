"""From a trained network to a pruned one: in one shot or in stages.

This package imports the core, `cbs_opt`, and `cbs_opt.instances`, and neither `cbs_opt.solvers` nor
`cbs_opt.bench`. Command lines, benchmarks and `cbs_opt.prune` import it.

- `method`: how a network is pruned, `Method`: source of H, stages, damping, what the held-out samples choose;
- `schedule`: how many weights each stage prunes;
- `samples`: training samples of each stage, and those held out; `network`: the copy of the network that changes;
- `problem`: the quadratic models of a stage; `statistics`: those of batch norms, re-estimated;
- `refits`: kept weights fitted to the outputs of the dense network, layer by layer;
- `gauss_newton`: steps of all of them together towards its outputs;
- `stage`: one stage: solve, apply, choose by the loss on held-out samples;
- `run`: all stages; `state`: what is stored for a restart; `search`: the largest sparsity for a given cost;
- `outcome`: the result, `Pruned`; `picture`: loss and layers.
"""
