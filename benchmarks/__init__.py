"""Measurements behind every number in the README and in RESULTS.md; one script per claim.

``python -m benchmarks`` runs all of them and rewrites RESULTS.md from ``benchmarks/results/*.json``;
``python -m benchmarks demo`` runs one, ``python -m benchmarks --collect`` only rewrites RESULTS.md.
"""
