"""Runs a fine-tuning job on an engine and keeps what happened."""

__version__ = "0.1.0"
