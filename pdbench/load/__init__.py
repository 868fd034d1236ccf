"""The load: prompts, arrivals and the client that measures."""
