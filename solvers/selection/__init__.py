"""Heuristics and bounds for the selection objective: convex relaxation, concave continuation, tabu search."""
