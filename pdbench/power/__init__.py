"""Device meters, the sampler and energy."""
