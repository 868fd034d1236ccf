"""Device meters and the sampler; energy over windows is in `analysis`."""
