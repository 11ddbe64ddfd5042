"""Networks of other architectures that start from a trained model's weights."""
