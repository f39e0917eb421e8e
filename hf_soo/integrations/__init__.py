"""Adapters to other people's training loops."""
