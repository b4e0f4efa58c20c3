"""Opening a model file: validation, limits, onnxruntime session."""
