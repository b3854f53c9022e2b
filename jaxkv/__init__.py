"""Paged KV-cache compression per attention head, for Llama-family models in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxkv.version import __version__ as __version__

if TYPE_CHECKING:
    from jaxkv.public import *  # noqa: F403
else:

    def __getattr__(name):
        """A public name; the first one imports JAX and all else, which takes seconds that ``--help`` doesn't need."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("jaxkv.public")
        if name == "__all__":
            return [known for known in vars(public) if not known.startswith("_")]
        try:
            return getattr(public, name)
        except AttributeError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
