"""Makes the embedded models: the corpus, the vocabulary, the trainer. Not part of the installed package."""
