"""The CPU back end of the operator, compiled by Numba."""
