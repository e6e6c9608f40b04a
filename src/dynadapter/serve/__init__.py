"""Deployment: bundles, predictions, exported graphs, and a router for a stream of images."""
