"""The laboratory: search of settings, a queue of jobs, and the comparison of what they found."""
