"""The mathematics: every op is one PyTorch function whose body is its meaning and its CPU path."""
