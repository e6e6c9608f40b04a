"""Callbacks for any LightningModule with one ExitNet; each schedules, checks or measures one thing."""

from dynadapter.training.callbacks.averaging import WeightAverage
from dynadapter.training.callbacks.early_exit import EarlyExit
from dynadapter.training.callbacks.finite_check import FiniteCheck
from dynadapter.training.callbacks.flops import FlopsReport
from dynadapter.training.callbacks.learning_check import LearningCheck
from dynadapter.training.callbacks.loss_weights import ExitWeights
from dynadapter.training.callbacks.sparsity import BidirectionalSparsity

__all__ = [
    "BidirectionalSparsity",
    "EarlyExit",
    "ExitWeights",
    "FiniteCheck",
    "FlopsReport",
    "LearningCheck",
    "WeightAverage",
]
