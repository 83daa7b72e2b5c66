"""Measuring and looking: curves of a training, pictures of predictions."""
