"""Runs and what is made of them: one JSON a run, tables and pictures from those."""
