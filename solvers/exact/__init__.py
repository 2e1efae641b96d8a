"""The solvers that prove: `exact` (`solver`), branch and bound with a first incumbent, and `brute`, enumeration.

- `certify`: the certificate of a proof, which `cbs_opt.certificate` checks without this package;
- `kept_sets`: enumeration where the Hessian is singular.

No other folder of `solvers` imports it; it imports `trees`, and `selection` and `joint` for first incumbents.
"""
