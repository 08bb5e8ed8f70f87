"""Inference engines behind one Protocol."""
