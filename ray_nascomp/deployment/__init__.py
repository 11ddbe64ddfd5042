"""What is shipped: ONNX files with real integers, and how fast they are."""
