"""The GPU back end of the operator, compiled by Triton."""
