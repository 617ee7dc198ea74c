"""Word-level text: corpora, batches and truncated-BPTT segments."""

from .corpus import Corpus, CorpusError, Vocabulary, batchify, digest, random_bptt_length, segment

__all__ = ["Corpus", "CorpusError", "Vocabulary", "batchify", "digest", "random_bptt_length", "segment"]
