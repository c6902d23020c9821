"""What a number format does to a model: to each tensor, to the streams layer by layer, and to the answers."""
