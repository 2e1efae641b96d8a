"""The columns of one block in a priced sweep, in numba; see `starts`."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cbs_opt.solvers.layers.kernels import entry


@entry
def decide_block(W, first, U, price, scale, locked, costs, errors):
    """Decide the columns first … first + b of all rows, one after the other, in place on W.

    Removing weight c of a row costs scale · (w_c / U_cc)²; it goes where that is less than the price, and the
    later columns of the block make up for it. O(rows · b²).

    Parameters
    ----------
    W : float64 (rows, K), in place
    first : int
    U : float64 (b, b)
        The block of the Cholesky factor of S⁻¹.
    price : float
    scale : float64 (rows,)
    locked : int8 (rows, K)
        1 must be pruned, −1 must be kept.
    costs : float64 (rows, K), out
    errors : float64 (rows, b), out
        w_c / U_cc of the weights that went, 0 of the others.
    """
    b = U.shape[0]
    for r in range(W.shape[0]):
        w = W[r, first : first + b]
        for c in range(b):
            error = w[c] / U[c, c]
            cost = scale[r] * error * error
            if locked[r, first + c] > 0:
                cost = -np.inf
            elif locked[r, first + c] < 0:
                cost = np.inf
            costs[r, first + c] = cost
            if cost < price:
                for j in range(c + 1, b):
                    w[j] -= U[c, j] * error
                w[c] = 0.0
                errors[r, c] = error
            else:
                errors[r, c] = 0.0
