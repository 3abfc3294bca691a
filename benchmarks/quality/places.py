"""Owns where the comparison's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "quality"
"""What can be made again; ignored by git."""
BASE = Path(__file__).parent / "base"
"""The pretrained small OLMoE, committed in bfloat16."""
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
