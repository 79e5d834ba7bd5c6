"""What a model remembers of the tokens before: one interface for the states of layers of every kind."""
from forge_c.state.layer import LayerState
from forge_c.state.model import ModelCache

__all__ = ["LayerState", "ModelCache"]
