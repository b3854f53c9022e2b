"""Parts of ``scripts/evaluate.py``."""
