"""The methods of the CBS paper and its baselines: saliencies, randomized magnitude pruning, swap local search."""
