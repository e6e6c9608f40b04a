"""Compare the speed of several ways to serve a bundle."""
