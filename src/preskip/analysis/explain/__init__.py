"""What a trained branch does, by layer and by token: the computing half of `preskip explain` (docs/explain.md)."""

from preskip.analysis.explain.explain import Extent, explain
from preskip.analysis.explain.reading import Text

__all__ = ["Extent", "Text", "explain"]
