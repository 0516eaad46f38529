"""What was published: a Hugging Face directory's config, tokenizer and shards, read and checked."""
