"""GGUF files: everything that changes what the model computes is honoured, or the file refused."""

from slm_plugin.models.gguf.parts import is_gguf
from slm_plugin.models.gguf.reading import read_gguf

__all__ = ["is_gguf", "read_gguf"]
