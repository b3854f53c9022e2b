"""What ``train_gate.py`` is made of."""
