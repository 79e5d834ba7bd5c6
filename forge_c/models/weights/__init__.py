"""Sources of weights: Hugging Face folders, and random numbers."""
from forge_c.models.weights.hf import Checkpoint
from forge_c.models.weights.random import RandomCheckpoint
from forge_c.models.weights.source import Tensors

__all__ = ["Checkpoint", "RandomCheckpoint", "Tensors"]
