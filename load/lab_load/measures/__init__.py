"""What was measured: one record a request, histograms, the servers' counters, the sums that must agree."""
