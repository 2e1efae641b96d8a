"""From networks to instances and back: networks, gradients, curvature, and the shipped instances.

This package imports the core, `cbs_opt`, and neither `cbs_opt.solvers` nor `cbs_opt.bench`. Importing it loads
nothing more; its modules load torch, and `cbs_opt.instances.digits` scikit-learn, when they are needed.

- `export`: from a trained network and samples to an instance; its options are a `recipe`;
- `gradients`: the gradient of every sample or mini-batch, by layers (`layers`) or by `torch.func`;
- `substitution`: a network run with other tensors in place of its own, as these gradients need it;
- `fisher`, `curvature`: the empirical Fisher matrix of these gradients, in the form that an instance needs;
- `reconstruction`: the layer-wise reconstruction error, another source of H;
- `kfac`, with `output_gradients`, `autograd_functions` and `fisher_terms`: that of each row times the mean squared
  gradient of the loss by its output; `row_sources`, `row_blocks`: both sources, and what their rows share in an
  instance;
- `losses`, `own_loss`: what is differentiated and reported; losses that a network computes itself;
- `prunable`, `plan`, `tensors`: which tensors are pruned, and their layout in an instance;
- `plain`, `stored_forms`: weights that are computed from others, in networks and in checkpoints;
- `products`, with `patches`, `recurrent`, `unfused` and `views`: what each weight of a network multiplies;
- `checkpoints`, over `containers`, `checkpoint_names` and `torch_file`: reading checkpoints into a network and
  writing them;
- `apply`, `masks`: applies a solution to the network; masks for further training;
- `dense`: loss and accuracy of the network on the samples of an export;
- `training`: a small and exactly repeatable training loop;
- `digits`: the script that generates the files of `library`.
"""
