"""Operations: one file a family, with its ONNX names, its FLOPs and its reference."""
