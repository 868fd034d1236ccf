"""vLLM servers: command lines, processes, deployments."""
