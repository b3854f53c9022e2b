"""The command line: ``python -m jaxkv generate`` and ``batch``."""

from jaxkv.cli.main import main as main
