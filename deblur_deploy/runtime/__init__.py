"""Run a model: numpy and onnxruntime only."""
