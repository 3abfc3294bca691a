"""Owns where the comparison's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "quality"
"""What can be made again; ignored by git."""
BASE = Path(__file__).parent / "base"
"""The pretrained small OLMoE, committed in bfloat16."""
LARGER_BASE = BUILD / "larger"
"""Not committed."""
RESULTS = ROOT / "benchmarks" / "results" / "quality"
RUNS = RESULTS / "runs"
"""A file for each run of the grid."""
LARGER_PRETRAINING = RESULTS / "larger.json"
"""How the larger base was made that the results are of."""
EXPERTS = RESULTS / "experts.json"
MISTAKES = RESULTS / "mistakes.json"
GEOMETRY = RESULTS / "adapter"
"""The adapter whose geometry is shown."""
PAGE = ROOT / "docs" / "quality.md"
