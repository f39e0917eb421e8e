"""The step loop and its instruments; it knows no method."""
