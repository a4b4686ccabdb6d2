"""The engine behind HTTP; extra ``serve``."""
