"""Pre-train a small ViT from scratch on a folder of images: a backbone for a machine without a network."""
