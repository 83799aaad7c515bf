"""GGUF files of packed language models, for llama.cpp: integers stay the integers they are."""

from fips.integrations.gguf.families import require_family
from fips.integrations.gguf.tokens import Vocabulary, vocabulary_of
from fips.integrations.gguf.write import GgufFile, Kind, export_gguf

__all__ = ["GgufFile", "Kind", "Vocabulary", "export_gguf", "require_family", "vocabulary_of"]
