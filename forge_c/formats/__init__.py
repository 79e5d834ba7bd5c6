"""Weight formats: where the numbers lie (layout), and how they are made and read (quantize)."""
from forge_c.formats.layout import FORMATS, Format

__all__ = ["FORMATS", "Format"]
