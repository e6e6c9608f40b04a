"""Image files and the tensors made of them: one pipeline for evaluation."""
