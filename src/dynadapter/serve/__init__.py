"""Deployment: bundles, predictions, exported graphs, streams of images, and the HTTP server."""
