"""From a checkpoint to one checked ONNX file.

`python -m train.export` is its command line.
"""
