"""The embedded demo: a byte-level Llama trained on the Python standard library, compressed on your interpreter's copy.

The model (3.5 M parameters, bf16) was trained by ``scripts/train_demo_model.py`` without the modules listed in
``held_out.txt``; the demo calibrates on other modules and measures bits per byte on those.
"""

from fips.demo.run import MODEL_DIRECTORY, demo_recipe, run_demo

__all__ = ["MODEL_DIRECTORY", "demo_recipe", "run_demo"]
