"""Time the ways to serve a bundle side by side."""
