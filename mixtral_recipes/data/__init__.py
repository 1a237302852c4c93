"""Data: modules with NeMo's names, from a file, a Hub id or an indexed corpus to packed microbatches.

`recognize` says which module reads a data set. Importing this package loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_recipes.data.recognise import Recognized, recognize

__all__ = ["Recognized", "recognize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mixtral_recipes.data import recognise as recognition

        return getattr(recognition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
