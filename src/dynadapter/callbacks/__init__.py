"""Callbacks: each schedules or measures one thing, in anybody's LightningModule that holds an ExitNet."""

from dynadapter.callbacks.averaging import WeightAverage
from dynadapter.callbacks.early_exit import EarlyExit
from dynadapter.callbacks.flops import FlopsReport
from dynadapter.callbacks.loss_weights import ExitWeights
from dynadapter.callbacks.predictions import PredictionWriter
from dynadapter.callbacks.sparsity import BidirectionalSparsity

__all__ = ["BidirectionalSparsity", "EarlyExit", "ExitWeights", "FlopsReport", "PredictionWriter", "WeightAverage"]
