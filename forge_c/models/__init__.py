"""Whole decoders of the LLaMA family from Hugging Face folders and GGUF files, and text generation."""
from forge_c.models.calibration import collect_importance
from forge_c.models.completion import Completion
from forge_c.models.model import EMBEDDED, Model, load, random_model
from forge_c.models.spec import ModelSpec
from forge_c.state import ModelCache

__all__ = ["EMBEDDED", "Completion", "Model", "ModelCache", "ModelSpec", "collect_importance", "load", "random_model"]


def __dir__() -> list[str]:
    """What is meant for users, for completion at a prompt."""
    return sorted(__all__)
