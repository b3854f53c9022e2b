"""The example of docs/parallel.md; ``test_devices.py`` runs this file in a process that has eight devices."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")


def test_the_example_runs():
    [code] = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/parallel.md", "exec"), {"__name__": "example"})
