"""Places in the integer arrays in which the depth-first trees keep their state and their stack."""

from __future__ import annotations

LEVEL, NODES, FOUND, POINT = range(4)
"""Entries of the state of a tree: top frame (−1: empty), nodes worked on, incumbents found.

POINT, of joint trees only, is the level of the last relaxed point (−1: the last node had none).
"""

QLEVEL, BRANCH, PENDING, VALUE = range(4)
"""Entries of a frame: its compressed level, branching column, open children, value of the next child."""

ROOT = 3
"""PENDING of a frame that is itself still to be solved."""
