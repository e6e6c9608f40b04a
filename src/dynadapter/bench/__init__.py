"""Timing of networks: arms interleaved in one run, medians of ratios."""
