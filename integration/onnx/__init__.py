"""Suites against Optimum and ONNX Runtime."""
