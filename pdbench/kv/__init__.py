"""The KV connector that vLLM loads: prefill pushes the KV cache to decode, over NCCL or TCP.

It imports nothing of the rest of pdbench, so that it also serves plain `vllm serve` (docs/kv-connector.md).
Try: python -c "from pdbench.kv.connector import PdKvConnector; print(PdKvConnector.__doc__)"
"""
