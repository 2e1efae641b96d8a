"""What proves optimality: branch and bound of our own, and models for the solvers of others."""
