"""Reinforcement learning with verifiable rewards on PyTorch Lightning, with semantic and token entropy."""

__version__ = "0.1.0"
