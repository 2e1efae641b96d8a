"""The presolved, scaled problems in connected components, and the conversion to and from instances."""
