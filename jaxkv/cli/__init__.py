"""The command line: ``python -m jaxkv generate`` and ``batch``."""
