"""From an ONNX file to a `Graph`: one file a step."""
