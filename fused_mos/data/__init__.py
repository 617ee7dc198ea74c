"""Word-level text: corpora, batches and truncated-BPTT segments."""

from .corpus import Corpus, CorpusError, Vocabulary, batchify, digest, random_bptt_length, read_text, segment

__all__ = ["Corpus", "CorpusError", "Vocabulary", "batchify", "digest", "random_bptt_length", "read_text", "segment"]
