"""Read and preprocess images: the one pipeline for evaluation."""
