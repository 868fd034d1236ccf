"""What a measurement shows while it runs: to a viewer process (a web page, Prometheus) and in the terminal. It never waits for them."""
