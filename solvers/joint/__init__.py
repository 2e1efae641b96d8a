"""Heuristics and bounds for the joint objective: elimination with updates, swaps on the loss after the update."""
