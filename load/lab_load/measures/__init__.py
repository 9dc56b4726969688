"""Measurements: one record for each request, histograms, the servers' counters, the sums that must agree."""
