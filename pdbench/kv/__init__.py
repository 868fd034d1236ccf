"""The KV connector that vLLM loads; imports nothing of the rest of pdbench."""
