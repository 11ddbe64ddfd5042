"""NNI's compressors, called the way today's torch needs them."""
