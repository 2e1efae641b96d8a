"""The exact solvers: branch and bound with a first incumbent and certificates, and enumeration."""
