"""The registered solvers that enumerate: branch and bound with a first selection and certificates, brute force."""
