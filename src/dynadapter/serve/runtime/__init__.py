"""Run an exported folder with only numpy, Pillow, and onnxruntime or openvino.

An exported folder holds copies of these files and of :mod:`dynadapter.images`, so that it runs where neither this
package nor torch is installed: ``python exported/predict.py photos``.
"""

from dynadapter.serve.runtime.runner import Prediction, Runner

__all__ = ["Prediction", "Runner"]
