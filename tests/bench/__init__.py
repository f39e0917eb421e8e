"""The benchmark: its limits, its suites, its curves."""
