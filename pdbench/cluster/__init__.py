"""More than one host: instances, samplers and clients as actors of a Ray cluster; imports Ray only when --cluster is given."""
