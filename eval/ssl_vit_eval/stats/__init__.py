"""Intervals and paired tests: over images, and over pretraining seeds."""
