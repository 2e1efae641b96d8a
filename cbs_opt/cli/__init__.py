"""The command lines. Only these modules reach across the rooms, inside their functions."""
