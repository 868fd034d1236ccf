"""What would a deployment that was not measured do: calibrated costs of vLLM's steps, simulated."""
