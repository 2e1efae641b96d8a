"""Places in the integer arrays in which the depth-first trees keep their state and their stack."""

from __future__ import annotations

LEVEL, NODES, FOUND, POINT, COUNTED = range(5)
"""Entries of the state of a tree: top frame (−1: empty), nodes worked on, incumbents found.

POINT and COUNTED are of joint trees only: the level of the last relaxed point (−1: the last node had none), and
the nodes that were settled by enumeration.
"""

QLEVEL, BRANCH, PENDING, VALUE = range(4)
"""Entries of a frame: its compressed level, branching column, open children, value of the next child."""

ROOT = 3
"""PENDING of a frame that is itself still to be solved."""
