"""The front doors: our checkpoints, somebody's ONNX file, their torch module, or a file of weights.

All lead to the same thing, a float ONNX body with its facts (``pipeline.network``) and a reference to compare it with;
nothing behind the doors knows which one it was.
"""
