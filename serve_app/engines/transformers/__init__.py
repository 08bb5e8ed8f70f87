"""The engine that runs a Hugging Face model step by step, on a CPU too."""
