"""Sources of weights: Hugging Face folders, GGUF files, and random numbers."""
from forge_c.models.weights.gguf import GGUFCheckpoint
from forge_c.models.weights.hf import Checkpoint
from forge_c.models.weights.random import RandomCheckpoint
from forge_c.models.weights.source import StoredTensors, Tensors, decay

__all__ = ["Checkpoint", "GGUFCheckpoint", "RandomCheckpoint", "StoredTensors", "Tensors", "decay"]
