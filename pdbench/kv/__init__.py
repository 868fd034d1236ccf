"""The KV connector that vLLM loads: prefill pushes the KV cache to decode, over NCCL or TCP (docs/kv-connector.md).

It runs inside `vllm serve` and imports nothing of pdbench but `pdbench.events`. Importing `pdbench.kv.compat` does not import vLLM.
"""
