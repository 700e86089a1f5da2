"""Text and token ids: tokenizers, what they keep on disk, chat templates, text as it arrives."""
