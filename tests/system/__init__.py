"""System tests: real programs on both sides of a real relay."""
