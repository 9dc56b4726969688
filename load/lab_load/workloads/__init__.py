"""Seeded workload files, expected hit ratios, arrival times. Knows nothing of HTTP or Locust."""
