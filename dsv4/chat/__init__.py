"""Words to token ids and back: tokenizer, prompt encoding of each release, parser of what the model says."""
