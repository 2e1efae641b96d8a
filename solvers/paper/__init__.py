"""The methods of the CBS paper and its baselines.

- `saliency`: random, magnitude, OBD and OBS; `single_updates`: the update of WoodFisher;
- `rmp` (Algorithm 2), `ls` (Algorithm 1) and `cbs` (both), with `all_swaps`; `judged`: by the network;
- `batch_evaluator`, `on_card`: many selections at a time, on the CPU or a card.

No other folder of `solvers` imports it; it imports `device`.
"""
