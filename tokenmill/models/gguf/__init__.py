"""All that knows GGUF's header and metadata: reading files, their tokenizers, and writing them."""
