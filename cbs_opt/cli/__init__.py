"""The command lines. Only these modules import the other packages, inside their functions."""
