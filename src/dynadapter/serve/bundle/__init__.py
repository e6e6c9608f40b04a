"""The folder to deploy: a trained network, its backbone's name and its preprocessing. Lightning is not needed.

A bundle is a folder of three files:

- ``model.safetensors``: the trained tensors (adapters, early heads, the backbone's own classifier); in a whole bundle,
  such as the bundle of a merged network, all tensors, so that no backbone file is needed.
- ``config.json``: the backbone's name, arguments and hash, adapter, heads, exits, policy with its temperatures, class
  names, preprocessing, cost of each exit, versions, and the hash of ``model.safetensors``.
- ``README.md``: the model card.

    bundle_from_classifier(classifier, "flowers", policy=Confidence(0.8))    # where it was trained
    bundle = load("flowers", weights="vit_base.safetensors")                 # where it serves
    bundle.predict(["a.jpg", "b.jpg"])        # [Prediction(label='daisy', confidence=0.98, exit_index=0), ...]
"""

from dynadapter.serve.bundle.classifier import bundle_from_classifier, in_memory
from dynadapter.serve.bundle.config import BackboneSource, Config
from dynadapter.serve.bundle.hub import push_to_hub
from dynadapter.serve.bundle.loading import Bundle, Prediction, from_pretrained, load
from dynadapter.serve.bundle.proof import MergeProof, merged_copy
from dynadapter.serve.bundle.saving import save_bundle

__all__ = [
    "BackboneSource",
    "Bundle",
    "Config",
    "MergeProof",
    "Prediction",
    "bundle_from_classifier",
    "from_pretrained",
    "in_memory",
    "load",
    "merged_copy",
    "push_to_hub",
    "save_bundle",
]
