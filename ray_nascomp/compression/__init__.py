"""Compression of a network: pruning, materialisation, quantization, distillation."""
