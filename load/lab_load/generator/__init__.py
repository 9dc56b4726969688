"""Locust: users that send the workload and read the answers. Knows HTTP; does not evaluate figures."""
