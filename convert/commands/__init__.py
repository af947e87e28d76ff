"""The commands of `python -m convert`: one module each, with a function of its name.

They print what they did and checked (`lines`); errors are ValueError, OSError or
ImportError.
"""
