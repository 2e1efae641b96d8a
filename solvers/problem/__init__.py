"""The problems as solvers see them: presolved, scaled, in connected components, with the way back."""
