"""Models from elsewhere and for elsewhere: GGUF files, Ollama, model cards."""
